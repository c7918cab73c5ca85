"""TransformerEngine's layers and FP8 on a GPU: the checks of te_checks.py and te_engine_checks.py.

tests/unit/test_te_checks.py runs the same functions on CPU. Attention in bf16 with heads of 64 runs in cuDNN's fused
kernels there (from compute capability 8.0; cuDNN comes with torch); in fp32 only TransformerEngine's unfused path
remains, so local layers are the fp32 truth.
"""

import importlib.util

import pytest
import torch

from megatron_depthattn.config.hardware_checks import unsupported_on
from megatron_depthattn.config.precision import RECIPES
from megatron_depthattn.train.hardware import this_machine
from tests.gpu import te_checks, te_engine_checks
from tests.gpu.te_models import BF16, Place, run

has_te = importlib.util.find_spec("transformer_engine") is not None
pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; tests/unit/test_te_checks.py runs on CPU"),
    pytest.mark.skipif(not has_te, reason="needs TransformerEngine; tests/unit/test_te_checks.py runs without"),
    pytest.mark.usefixtures("megatron_world_of_one"),
]
GPU = Place("cuda", "te")
REPEATED = 1e-3
"""Two runs of the same numbers: sums into the embedding's gradient have no order on a GPU; a step of bf16 is 2**-8."""


@pytest.fixture(autouse=True)
def deterministic_attention(monkeypatch):
    """cuDNN's backward pass otherwise sums in any order; read when a model is built."""
    monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")


@pytest.fixture
def recipe(request) -> str | None:
    """A recipe that this machine has, else the test is skipped with the reason a run would be rejected for."""
    skip_where_unsupported(request.param)
    return request.param


def skip_where_unsupported(recipe: str | None, *settings: str) -> None:
    settings = (BF16, *([f"precision.fp8={recipe}"] if recipe else []), *settings)
    if (error := unsupported_on(GPU.config(*settings), this_machine())) is not None:
        pytest.skip(error)


def each(*recipes: str | None):
    return pytest.mark.parametrize("recipe", recipes, indirect=True)


@pytest.mark.parametrize("op", ["lean", "triton"])
@pytest.mark.parametrize("mixing", te_checks.MIXING)
def test_bf16_parity(mixing, op, record_property):
    if (mixing, op) == ("vanilla", "triton"):
        pytest.skip("a vanilla model has no mix")
    record_property("found", te_checks.check_bf16_parity(GPU, mixing, op))


def test_attention_is_fused():
    from transformer_engine.pytorch.attention.dot_product_attention import _attention_backends

    run(GPU.build(BF16), GPU.tokens())
    chosen = {name: value for name, value in _attention_backends.items() if name.startswith("use_")}
    assert chosen["use_fused_attention"] and not chosen["use_unfused_attention"], chosen


@pytest.mark.parametrize("mixing", ["stride 3", "stride 1"])
@each(*RECIPES)
def test_recipe(recipe, mixing, record_property):
    record_property("found", te_checks.check_recipe(GPU, recipe, mixing))


@each(None, *RECIPES)
def test_recompute(recipe, record_property):
    record_property("found", te_checks.check_recompute(GPU, recipe, REPEATED))


@each(*(name for name in RECIPES if name != "delayed"))
def test_first_and_last_layers_in_bf16(recipe, record_property):
    record_property("found", te_checks.check_bf16_layers(GPU, recipe))


@each(None, *(name for name in RECIPES if name != "mxfp8"))
def test_the_optimizers_weights_are_those_drawn(recipe, record_property):
    record_property("found", te_engine_checks.check_masters(GPU, recipe))


@pytest.mark.parametrize("name", [name for name, recipe in RECIPES.items() if recipe.attention_gpus])
def test_fp8_attention(name, record_property):
    """With heads of 128: cuDNN's FP8 backward pass takes no others on compute capability 9.0."""
    settings = ("precision.fp8_attention=true", "model.kv_channels=128")
    skip_where_unsupported(name, *settings)
    record_property("found", te_checks.check_recipe(GPU, name, "stride 3", *settings))
    half = te_checks.settled(GPU.build(BF16, f"precision.fp8={name}", settings[1]), GPU)
    own = te_checks.settled(GPU.build(BF16, f"precision.fp8={name}", *settings), GPU)
    assert te_checks.relative_error(own.logits, half.logits) > 1e-3, "attention stayed in bf16"


@pytest.mark.parametrize("params", [False, True])
@each(None, *RECIPES)
def test_save_and_resume(recipe, params, tmp_path, record_property):
    if params and recipe in (None, "mxfp8"):
        pytest.skip("this recipe keeps no weights in FP8")
    # Weights in FP8 are saved as bf16 and rounded once more when they are loaded.
    settings, bound = (("precision.fp8_params=true",), 1e-3) if params else ((), 1e-4)
    record_property("found", te_engine_checks.check_resume(GPU, tmp_path, recipe, bound, *settings))


@pytest.mark.parametrize("recompute", [False, True])
@each(None, "delayed", "tensorwise")
def test_memory(recipe, recompute, record_property):
    settings = (BF16, "data.sequence_length=1024", *([f"precision.fp8={recipe}"] if recipe else []))
    record_property("found", te_engine_checks.check_memory(GPU, 0.05, *settings, recompute=recompute))


@each(None, "tensorwise")
def test_packed_documents(recipe, record_property):
    """In bf16 the kernels of packed and plain attention round differently; FP8 scales are those of all documents, so
    roundings are independent."""
    bound = te_checks.FP8_LOGITS if recipe else te_checks.BF16_LOGITS
    settings = (BF16, *([f"precision.fp8={recipe}"] if recipe else []))
    record_property("found", te_checks.check_packed(GPU, [48, 64, 16], bound, *settings))
