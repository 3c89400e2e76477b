"""The kernel repository's own tests, which want a GPU and the `kernels` library, on the bundled kernels: on a CPU interpreted."""

import importlib.util

import pytest
from nemotron_super.kernels_hub import registry

pytestmark = pytest.mark.no_cover

FILE = registry.BUNDLE / "tests" / "test_kernels.py"
spec = importlib.util.spec_from_file_location("tests_of_the_kernel_repository", FILE)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
globals().update({name: test for name, test in vars(module).items() if name.startswith("test_")})


@pytest.fixture(scope="module")
def ops():
    return registry._bundle()
