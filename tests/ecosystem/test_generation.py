"""`generate`, `pipeline` and streamers: every way of asking gives the tokens that a run without a cache gives."""

from __future__ import annotations

from threading import Thread

import pytest
import torch
from nemotron_super import HybridCache, NemotronHForCausalLM
from transformers import DynamicCache, StaticCache, TextIteratorStreamer, TextStreamer, pipeline
from transformers.models.nemotron_h import configuration_nemotron_h as their_configuration
from transformers.models.nemotron_h import modeling_nemotron_h as their_modeling

GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture
def expected(model, ids):
    """Greedy tokens, the whole sequence read again for each of them."""
    sequence = ids
    with torch.no_grad():
        for _ in range(GREEDY["max_new_tokens"]):
            chosen = model(sequence, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
            sequence = torch.cat([sequence, chosen], dim=1)
    return sequence


@pytest.mark.parametrize("implementation", [None, "dynamic", "static"])
@pytest.mark.parametrize("chunk", [None, 4])
def test_caches(model, ids, expected, implementation, chunk):
    """Each cache, its prompt read at once or in pieces, gives the tokens of a run without a cache."""
    found = model.generate(ids, cache_implementation=implementation, prefill_chunk_size=chunk, **GREEDY)
    assert found.equal(expected)
    assert len(set(found[:, ids.shape[1] :].flatten().tolist())) > 3  # not one token over and over


def test_use_cache_false(model, ids, expected):
    assert model.generate(ids, use_cache=False, **GREEDY).equal(expected)


def test_quantized_cache(model, ids):
    """In FP8, which is all that this model's cache knows; transformers' other backends are refused by name."""
    out = model.generate(ids, cache_implementation="quantized", return_dict_in_generate=True, **GREEDY)
    assert out.cache.kv_dtype == torch.float8_e4m3fn
    with pytest.raises(ValueError, match="backend 'hqq'"):
        model.generate(ids, cache_implementation="quantized", cache_config={"backend": "hqq"}, **GREEDY)


@pytest.mark.parametrize("implementation", ["dynamic", "static"])
def test_left_padding(model, ids, expected, implementation):
    """A short row padded on the left goes on as it does alone, with the same logits."""
    options = {**GREEDY, "return_dict_in_generate": True, "output_logits": True}
    short = ids[:1, 4:]
    batch = torch.cat([torch.cat([torch.zeros_like(ids[:1, :4]), short], dim=1), ids[1:]])
    found = model.generate(batch, attention_mask=(batch != 0).long(), cache_implementation=implementation, **options)
    alone = model.generate(short, **options)
    assert found.sequences[0, ids.shape[1] :].equal(alone.sequences[0, short.shape[1] :])
    assert found.sequences[1].equal(expected[1])
    for one, other in zip(found.logits, alone.logits, strict=True):
        torch.testing.assert_close(one[:1], other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pattern", ["MEM-", "E*-", "M"])
@pytest.mark.parametrize("extra", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
def test_other_patterns(tiny_model, ids, pattern, extra):
    """Models without attention, and without Mamba-2, generate as well."""
    model = tiny_model(hybrid_override_pattern=pattern)
    without = {key: value for key, value in extra.items() if key != "cache_implementation"}
    assert model.generate(ids, **GREEDY, **extra).equal(model.generate(ids, use_cache=False, **GREEDY, **without))


def test_beam_search(model, ids, expected):
    """Beams are reordered in the cache as well as in the tokens."""
    beams = {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.0}
    found = model.generate(ids, return_dict_in_generate=True, output_scores=True, **beams, **GREEDY)
    slow = model.generate(ids, return_dict_in_generate=True, output_scores=True, use_cache=False, **beams, **GREEDY)
    assert found.sequences.equal(slow.sequences)
    torch.testing.assert_close(found.sequences_scores, slow.sequences_scores, rtol=1e-4, atol=1e-4)
    assert not found.sequences[::2].equal(expected)  # or the test would show nothing about reordering
    with torch.no_grad():  # the score is the log-probability of the new tokens
        logits = model(found.sequences).logits[:, ids.shape[1] - 1 : -1].log_softmax(-1)
    chosen = logits.gather(-1, found.sequences[:, ids.shape[1] :, None]).sum((1, 2))
    torch.testing.assert_close(found.sequences_scores, chosen, rtol=1e-4, atol=1e-4)


def test_sampling(model, ids, expected):
    """Seeds repeat a sample; `top_k=1` is greedy; temperature changes what comes out."""

    def sample(seed, **options):
        torch.manual_seed(seed)
        return model.generate(ids, **{**GREEDY, "do_sample": True, **options})

    assert sample(0, temperature=2.0).equal(sample(0, temperature=2.0))
    assert not sample(0, temperature=2.0).equal(sample(1, temperature=2.0))
    assert sample(0, top_k=1).equal(expected)


def test_num_return_sequences(model, ids):
    """Several samples of a prompt equal the prompt repeated by hand."""
    options = {**GREEDY, "do_sample": True, "temperature": 2.0}
    torch.manual_seed(0)
    found = model.generate(ids, num_return_sequences=3, **options)
    torch.manual_seed(0)
    by_hand = model.generate(ids.repeat_interleave(3, dim=0), **options)
    assert found.shape == (6, ids.shape[1] + 8)
    assert found.equal(by_hand)
    assert not found[0].equal(found[1])


def test_inputs_embeds(model, ids, expected):
    embeds = model.get_input_embeddings()(ids)
    assert model.generate(inputs_embeds=embeds, **GREEDY).equal(expected[:, ids.shape[1] :])


def test_stop_strings(model, tokenizer, ids):
    """Generation ends right after the string, whatever would have come next."""
    options = {**GREEDY, "max_new_tokens": 40}
    whole = model.generate(ids[:1], **options)[0]
    start = ids.shape[1]
    texts = [tokenizer.decode(token) for token in whole[start:]]
    where = next(
        n for n, text in enumerate(texts) if n and text.isascii() and text.isprintable() and text not in texts[:n]
    )
    assert where < 39
    found = model.generate(ids[:1], stop_strings=["absent", texts[where]], tokenizer=tokenizer, **options)
    assert found[0].equal(whole[: start + where + 1])


def test_eos_pads_the_rest(model, ids, expected):
    """A row that ended is padded while the other goes on undisturbed."""
    end = int(expected[0, ids.shape[1] + 2])
    found = model.generate(ids, **{**GREEDY, "eos_token_id": end})
    new = found[0, ids.shape[1] :].tolist()
    first = new.index(end)
    assert first <= 2 and set(new[first + 1 :]) <= {0}
    other = expected[1, ids.shape[1] :].tolist()
    keep = other.index(end) + 1 if end in other else len(other)
    assert found[1, ids.shape[1] :].tolist()[:keep] == other[:keep]


def test_return_dict(tiny_model, ids):
    """Logits, hidden states, attentions and the cache come with the tokens."""
    model = tiny_model(attn_implementation="eager")
    found = model.generate(
        ids,
        return_dict_in_generate=True,
        output_logits=True,
        output_scores=True,
        output_hidden_states=True,
        output_attentions=True,
        **GREEDY,
    )
    steps, length = GREEDY["max_new_tokens"], ids.shape[1]
    assert len(found.logits) == len(found.scores) == len(found.hidden_states) == len(found.attentions) == steps
    assert len(found.hidden_states[0]) == model.config.num_hidden_layers + 1
    assert found.hidden_states[0][0].shape == (2, length, 32) and found.hidden_states[1][0].shape == (2, 1, 32)
    assert [a.shape for a in found.attentions[1]] == [(2, 4, 1, length + 1)]
    assert isinstance(found.cache, HybridCache)
    assert found.cache.get_seq_length() == length + steps - 1
    with torch.no_grad():
        once = model(found.sequences).logits[:, length - 1 : -1]
    torch.testing.assert_close(torch.stack(found.logits, dim=1), once, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("new_tokens", [0, 1, 5])
@pytest.mark.parametrize("make", ["returned", "hybrid", "dynamic", "static"])
def test_continuing_from_a_cache(model, ids, expected, make, new_tokens):
    """A second turn that starts from the first one's cache equals one that starts from nothing."""
    made = {
        "returned": lambda: None,
        "hybrid": lambda: HybridCache(model.config),
        "dynamic": lambda: DynamicCache(config=model.config),
        "static": lambda: StaticCache(config=model.config, max_cache_len=64),
    }[make]()
    first = model.generate(ids, cache=made, return_dict_in_generate=True, **GREEDY)
    assert first.sequences.equal(expected)
    turn = torch.cat([first.sequences, ids[:, :new_tokens].flip(1)], dim=1)
    cache = first.cache
    assert made is None or cache is made
    assert model.generate(turn, cache=cache, **GREEDY).equal(model.generate(turn, **GREEDY))


@pytest.mark.parametrize(
    "options",
    [{"assistant_model": True}, {"prompt_lookup_num_tokens": 2}, {"use_mtp": True}],
    ids=lambda o: next(iter(o)),
)
def test_assisted_generation(model, ids, options, expected):
    """What transformers' own class refuses: recurrent state cannot be taken back there."""
    if "assistant_model" in options:
        options = {"assistant_model": model}
    assert model.generate(ids[:1], **options, **GREEDY).equal(expected[:1])


def test_assisted_generation_is_refused_by_transformers(model, ids):
    config = their_configuration.NemotronHConfig(hybrid_override_pattern="M*", vocab_size=272, hidden_size=32)
    theirs = their_modeling.NemotronHForCausalLM(config)
    with pytest.raises(ValueError, match="stateful"):
        theirs.generate(ids[:1], prompt_lookup_num_tokens=2, **GREEDY)


def test_text_streamer(model, tokenizer, ids, expected, capsys):
    model.generate(ids[:1], streamer=TextStreamer(tokenizer, skip_prompt=True), **GREEDY)
    assert capsys.readouterr().out.rstrip("\n") == tokenizer.decode(expected[0, ids.shape[1] :]).rstrip("\n")


def test_text_iterator_streamer(model, tokenizer, ids, expected):
    """Text arrives piece by piece in another thread, and adds up."""
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    thread = Thread(target=model.generate, args=(ids[:1],), kwargs={"streamer": streamer, **GREEDY})
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert "".join(pieces) == tokenizer.decode(expected[0, ids.shape[1] :])


@pytest.fixture(scope="module")
def writer(tmp_path_factory, tokenizer, tiny_model):
    """A text-generation pipeline made from a folder."""
    path = tmp_path_factory.mktemp("pipeline")
    tiny_model().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return pipeline("text-generation", model=str(path), device="cpu")


def test_pipeline_plain(writer, tokenizer):
    """The pipeline loads our class from a folder and writes what `generate` writes."""
    assert type(writer.model) is NemotronHForCausalLM
    prompt = "def main():"
    found = writer(prompt, return_full_text=False, **GREEDY)[0]["generated_text"]
    inputs = tokenizer(prompt, return_tensors="pt")
    tokens = writer.model.generate(**inputs, **GREEDY)[0, inputs.input_ids.shape[1] :]
    assert found == tokenizer.decode(tokens, skip_special_tokens=True)


def test_pipeline_batch(writer):
    """Prompts of different lengths in one batch give what each gives alone."""
    prompts = ["a", "import os", "for i in range(10):\n    print(i)"]
    together = writer(prompts, batch_size=3, return_full_text=False, **GREEDY)
    alone = [writer(prompt, return_full_text=False, **GREEDY) for prompt in prompts]
    assert together == alone
    assert len({str(text) for text in together}) == 3


def test_pipeline_chat(writer, tokenizer):
    """A conversation comes back with the assistant's turn, written from the chat template's prompt."""
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    found = writer(chat, **GREEDY)[0]["generated_text"]
    assert found[:2] == chat and found[2]["role"] == "assistant"
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = writer.model.generate(**prompt, **GREEDY)[0, prompt["input_ids"].shape[1] :]
    assert found[2]["content"] == tokenizer.decode(tokens, skip_special_tokens=True)


def test_pipeline_sampling(writer):
    found = writer("x =", num_return_sequences=3, **{**GREEDY, "do_sample": True, "temperature": 2.0})
    assert len({entry["generated_text"] for entry in found}) == 3
