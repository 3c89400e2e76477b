"""Teaches `nemotron-h-tiny` reasoning-gym tasks, by full fine-tuning and by adapters, and counts exact answers before and after.

    pip install reasoning-gym
    python tests/benchmarks/reasoning.py OUTPUT sft lora --save

Questions come from reasoning-gym's generators at small sizes, with instructions that never change left out; answers are its own.
Training, validation and test questions have seeds of their own, and a question that occurs in an earlier one of these is left
out of the later. The runs are `nemotron-super sft` and `lora` with `reasoning_sft.yaml` and `reasoning_lora.yaml` beside this file:
same conversations, same steps. Settings were chosen on the validation questions (`--split validation`), what is reported comes from
the test questions. An answer counts if greedy decoding gives exactly its text.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections import Counter
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import matplotlib
import nemotron_super
import reasoning_gym
import torch
import yaml
from nemotron_super import NemotronHForCausalLM
from nemotron_super.training.run import run
from nemotron_super.training.run_config import LoraRunConfig, SftConfig
from reasoning_gym.logic.aiw import TaskType
from transformers import AutoTokenizer

matplotlib.use("agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
TINY = Path(nemotron_super.__file__).parent / "model_card" / "nemotron-h-tiny"
# An item is made from the seed plus its place, so seeds lie far apart.
SEEDS = {"train": 10_000_000, "validation": 20_000_000, "test": 30_000_000}
KINDS: dict[str, Any] = {"sft": SftConfig, "lora": LoraRunConfig}


def after(mark: str, put: str = "") -> Callable[[str], str]:
    """A question from behind `mark` on."""
    return lambda question: put + question.rpartition(mark)[2].strip()


def whole(question: str) -> str:
    """A question as it is."""
    return question.strip()


# Per task: sizes for its generator, and the question without its standing instructions.
TASKS: dict[str, tuple[dict, Callable[[str], str]]] = {
    "aiw": ({"task_types": [TaskType.SIBLINGS], "task_type_weights": [1.0]}, whole),
    "family_relationships": ({"min_family_size": 4, "max_family_size": 4}, whole),
    "needle_haystack": ({"min_num_statements": 2, "max_num_statements": 3}, whole),
    "number_filtering": (
        {"min_numbers": 3, "max_numbers": 3, "max_decimals": 0, "min_value": 0, "max_value": 99},
        lambda question: question.partition("\n")[0],
    ),
    "palindrome_generation": (
        {"min_length": 3, "max_length": 3},  # longer ones have several answers
        after("using the following letters:", "Palindrome: "),
    ),
    "rotate_matrix": ({"min_n": 2, "max_n": 2, "max_rotations": 3}, after("same format as the input.")),
    "spiral_matrix": (
        {"min_n": 2, "max_n": 3},
        after("For the matrix below, what is the list of elements in spiral order?", "Spiral:\n"),
    ),
    "word_sequence_reversal": ({"min_words": 2, "max_words": 3}, after("Reverse this list of words:", "Reverse: ")),
}


def questions(task: str, split: str, size: int) -> list[dict]:
    """Questions with their answers."""
    options, shorten = TASKS[task]
    made = reasoning_gym.create_dataset(task, size=size, seed=SEEDS[split], **options)
    return [{"task": task, "question": shorten(e["question"]), "answer": str(e["answer"]).strip()} for e in made]


def make_data(sizes: dict[str, int]) -> dict[str, list[dict]]:
    """The three splits, in an order that mixes the tasks, without a question that an earlier split holds."""
    seen: set[tuple[str, str]] = set()
    data: dict[str, list[dict]] = {}
    for split, size in sizes.items():
        # More than wanted: what is double is left out of validation and test.
        per_task = [questions(task, split, size if split == "train" else 3 * size) for task in TASKS]
        if split != "train":
            per_task = [[e for e in made if (e["task"], e["question"]) not in seen][:size] for made in per_task]
        seen |= {(e["task"], e["question"]) for made in per_task for e in made}
        longest = max(map(len, per_task))
        data[split] = [made[place] for place in range(longest) for made in per_task if place < len(made)]
    return data


@torch.inference_mode()
def answers(model: NemotronHForCausalLM, tokenizer: Any, asked: list[dict], batch: int = 64) -> list[str]:
    """What the model answers, greedily, without thinking."""
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": e["question"]}], tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        for e in asked
    ]  # fmt: skip
    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    found = [""] * len(prompts)
    for start in range(0, len(order), batch):
        places = order[start : start + batch]
        inputs = tokenizer(
            [prompts[place] for place in places], return_tensors="pt", padding=True, add_special_tokens=False
        )
        ids = model.generate(
            input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=24, do_sample=False
        )
        for place, row in zip(places, ids[:, inputs.input_ids.shape[1] :], strict=True):
            found[place] = tokenizer.decode(row, skip_special_tokens=True).strip()
    return found


def exact(model: NemotronHForCausalLM, tokenizer: Any, asked: list[dict]) -> dict[str, float]:
    """Share of exact answers, per task and over all tasks alike."""
    right: Counter[str] = Counter()
    for e, answer in zip(asked, answers(model.eval(), tokenizer, asked), strict=True):
        right[e["task"]] += answer == e["answer"]
    counts = Counter(e["task"] for e in asked)
    shares = {task: right[task] / counts[task] for task in sorted(counts)}
    return {**shares, "mean": sum(shares.values()) / len(shares)}


def constant(train: list[dict], asked: list[dict]) -> dict[str, float]:
    """What always giving a task's most frequent training answer would score."""
    shares = {}
    for task in sorted(TASKS):
        usual = Counter(e["answer"] for e in train if e["task"] == task).most_common(1)[0][0]
        mine = [e["answer"] == usual for e in asked if e["task"] == task]
        shares[task] = sum(mine) / len(mine)
    return {**shares, "mean": sum(shares.values()) / len(shares)}


def draw(result: dict, path: Path) -> None:
    """Training loss of each run, and exact answers per task."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained", width_ratios=(2, 3))
    for kind, found in result["runs"].items():
        left.plot(
            [e["step"] for e in found["training"]], [e["lm_loss"] for e in found["training"]], lw=0.8, label=kind.upper()
        )  # fmt: skip
    left.set(title="training loss, next token", xlabel="step", ylabel="nats per answer token", yscale="log")
    left.legend()
    tasks = [task for task in result["constant"] if task != "mean"]
    bars = {"constant answer": result["constant"]} | ({"before": result["before"]} if result["before"] else {})
    bars |= {kind.upper(): found["exact"] for kind, found in result["runs"].items()}
    for place, (label, shares) in enumerate(bars.items()):
        right.bar([x + 0.2 * place - 0.3 for x in range(len(tasks))], [shares[t] for t in tasks], 0.2, label=label)
    right.set_xticks(range(len(tasks)), [task.replace("_", "\n", 1) for task in tasks], fontsize="x-small")
    right.set(title=f"exact answers, {result['split']} questions", ylim=(0, 1.05))
    right.legend(fontsize="small")
    figure.savefig(path, dpi=100)


def main() -> None:
    """Make the data, run, count exact answers, and with `--save` write the results and the picture for the card."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("kinds", nargs="+", choices=KINDS)
    parser.add_argument("--per-task", type=int, default=1000, help="training questions of each task")
    parser.add_argument("--questions", type=int, default=100, help="validation and test questions of each task")
    parser.add_argument("--split", default="test", choices=["validation", "test"], help="what to count on")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings instead of the files'")
    parser.add_argument("--hardware", default="CPU")
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(TINY)
    data = make_data({"train": options.per_task, "validation": options.questions, "test": options.questions})
    options.output.mkdir(parents=True, exist_ok=True)
    chats = options.output / "chats.jsonl"
    lines = (
        {"messages": [{"role": "user", "content": e["question"]}, {"role": "assistant", "content": e["answer"]}]}
        for e in data["train"]
    )
    chats.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    asked = data[options.split]

    def load(path: Path) -> NemotronHForCausalLM:
        return NemotronHForCausalLM.from_pretrained(path, dtype=torch.float32)

    result = {
        "date": datetime.date.today().isoformat(),
        "hardware": options.hardware,
        "threads": torch.get_num_threads(),
        "reasoning_gym": metadata.version("reasoning-gym"),
        "split": options.split,
        "questions": dict(Counter(e["task"] for e in asked)),
        "training_questions": len(data["train"]),
        "constant": constant(data["train"], asked),
        "runs": {},
    }
    for kind in options.kinds:
        trained = options.output / f"{kind}.json"  # written last: a run that is finished is not repeated
        if not trained.exists():
            content = yaml.safe_load((HERE / f"reasoning_{kind}.yaml").read_text(encoding="utf-8"))
            content |= {"model": str(TINY), "output": str(options.output / kind), "data": str(chats)}
            content |= {key: yaml.safe_load(value) for key, _, value in (one.partition("=") for one in options.set)}
            summary = run(KINDS[kind].of(content))
            log = json.loads((options.output / kind / "log.json").read_text(encoding="utf-8"))
            kept = ("trained", "parameters", "steps", "seconds", "versions")
            logged = ("step", "loss", "lm_loss", "mtp_loss", "tokens_per_second")
            found = {name: summary[name] for name in kept}
            found["settings"] = {k: v for k, v in content.items() if k not in ("model", "output", "data")}
            found["training"] = [{name: e[name] for name in logged} for e in log if "loss" in e]
            trained.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        result["runs"][kind] = json.loads(trained.read_text(encoding="utf-8"))
        result["runs"][kind]["exact"] = exact(load(options.output / kind), tokenizer, asked)
        print(kind, result["runs"][kind]["exact"], flush=True)
    result["before"] = {} if options.split == "validation" else exact(load(TINY), tokenizer, asked)
    (options.output / f"{options.split}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for task in result["constant"]:
        columns = [result["constant"], result["before"], *(found["exact"] for found in result["runs"].values())]
        print(f"| {task} | {' | '.join(f'{shares[task]:.1%}' for shares in columns if shares)} |")
    draw(result, options.output / "reasoning.png")
    if options.save:
        (HERE / "results" / "reasoning_cpu.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        draw(result, TINY / "reasoning.png")


if __name__ == "__main__":
    main()
