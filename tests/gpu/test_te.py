"""TransformerEngine's layers and FP8 on a GPU: the checks of te_checks.py and te_engine_checks.py.

`make test-te` runs this very file on a CPU, over kernels in plain torch (tests/te/inside.py). On a GPU attention in
bf16 with heads of 64 runs in cuDNN's fused kernels (from compute capability 8.0; cuDNN comes with torch); in fp32 only
TransformerEngine's unfused path remains, so local layers are the fp32 truth.
"""

import importlib.util

import pytest
import torch

from megatron_depthattn.config.hardware_checks import muon_lacks, unsupported_on
from megatron_depthattn.config.precision import RECIPES
from megatron_depthattn.train import hardware
from tests.gpu import te_checks, te_engine_checks
from tests.gpu.te_models import BF16, RECOMPUTE, Place, run
from tests.te import stand_in

has_te = importlib.util.find_spec("transformer_engine") is not None
on_gpu = torch.cuda.is_available()
pytestmark = [
    pytest.mark.skipif(not (on_gpu or stand_in.is_computing), reason="needs a GPU; make test-te runs it on a CPU"),
    pytest.mark.skipif(not has_te, reason="needs TransformerEngine; make test-te brings its Python"),
    pytest.mark.usefixtures("megatron_world_of_one"),
]
needs_kernels = pytest.mark.skipif(stand_in.is_computing, reason="is about a GPU's own kernels")
PLACE = Place("cuda" if on_gpu else "cpu", "te")
REPEATED = 1e-3 if on_gpu else 0.0
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
    settings = (BF16, *fp8(recipe), *settings)
    if (error := unsupported_on(PLACE.config(*settings), hardware.this_machine())) is not None:
        pytest.skip(error)


def fp8(recipe: str | None) -> tuple[str, ...]:
    return (f"precision.fp8={recipe}",) if recipe else ()


def each(*recipes: str | None):
    return pytest.mark.parametrize("recipe", recipes, indirect=True)


@pytest.mark.parametrize("mixing", te_checks.MIXING)
def test_bf16_parity(mixing, record_property):
    record_property("found", te_checks.check_bf16_parity(PLACE, mixing))


@needs_kernels
@pytest.mark.parametrize("mixing", ["stride 1", "stride 3"])
def test_bf16_parity_of_the_triton_mix(mixing, record_property):
    record_property("found", te_checks.check_bf16_parity(PLACE, mixing, "triton"))


@needs_kernels
def test_attention_is_fused():
    from transformer_engine.pytorch.attention.dot_product_attention import _attention_backends

    run(PLACE.build(BF16), PLACE.tokens())
    chosen = {name: value for name, value in _attention_backends.items() if name.startswith("use_")}
    assert chosen["use_fused_attention"] and not chosen["use_unfused_attention"], chosen


@pytest.mark.parametrize("mixing", ["stride 3", "stride 1"])
@each(*RECIPES)
def test_recipe(recipe, mixing, record_property):
    record_property("found", te_checks.check_recipe(PLACE, recipe, mixing))


@pytest.mark.parametrize("mixing", te_checks.METHODS)
@each("delayed", "mxfp8")
def test_recipe_of_other_methods(recipe, mixing, record_property):
    record_property("found", te_checks.check_recipe(PLACE, recipe, mixing))


@each(None, *RECIPES)
def test_recompute(recipe, record_property):
    record_property("found", te_checks.check_recompute(PLACE, recipe, REPEATED))


@pytest.mark.parametrize("mixing", te_checks.METHODS)
@each("delayed", "mxfp8")
def test_recompute_of_other_methods(recipe, mixing, record_property):
    """Attention Residuals add to a snapshot's gradient inside and outside of a recomputed layer."""
    bound = te_checks.ROUNDED_SUMS if mixing == "attnres" else REPEATED
    record_property("found", te_checks.check_recompute(PLACE, recipe, bound, mixing))


def test_recompute_of_a_looped_model(record_property):
    """A weight's gradients of both loops are added to each other in another order."""
    record_property("found", te_checks.check_recompute(PLACE, None, te_checks.ROUNDED_SUMS / 10, "looped"))


@pytest.mark.parametrize("mode", [mode for mode in RECOMPUTE if mode != "uniform-1"])
@each("delayed")
def test_recompute_in_groups(recipe, mode, record_property):
    """Layers that are recomputed together round their sum of a source's gradients before it joins the others'."""
    bound = REPEATED if mode.startswith("block") else te_checks.ROUNDED_SUMS
    record_property("found", te_checks.check_recompute(PLACE, recipe, bound, mode=mode))


@each(*(name for name in RECIPES if name != "delayed"))
def test_weights_are_cast_anew(recipe, record_property):
    record_property("found", te_checks.check_weights_are_cast_anew(PLACE, recipe, REPEATED))


@each(*(name for name in RECIPES if name != "delayed"))
def test_first_and_last_layers_in_bf16(recipe, record_property):
    record_property("found", te_checks.check_bf16_layers(PLACE, recipe))


@each(None, *(name for name in RECIPES if name != "mxfp8"))
def test_the_optimizers_weights_are_those_drawn(recipe, record_property):
    record_property("found", te_engine_checks.check_masters(PLACE, recipe))


@pytest.mark.parametrize("name", [name for name, recipe in RECIPES.items() if recipe.attention_gpus])
def test_fp8_attention(name, monkeypatch, record_property):
    """Below cuDNN 9.19 TransformerEngine trains no FP8 attention with `deterministic_attention`."""
    monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "1")
    skip_where_unsupported(name, *te_checks.FP8_ATTENTION)
    record_property("found", te_checks.check_fp8_attention(PLACE, name))


@pytest.mark.parametrize("params", [False, True])
@each(None, *RECIPES)
def test_save_and_resume(recipe, params, tmp_path, record_property):
    if params and recipe in (None, "mxfp8"):
        pytest.skip("this recipe keeps no weights in FP8")
    settings = ("precision.fp8_params=true",) if params else ()
    record_property("found", te_engine_checks.check_resume(PLACE, tmp_path, recipe, REPEATED / 10, *settings))


@pytest.mark.skipif(bool(muon_lacks()), reason=f"Muon needs what is missing here: {muon_lacks()}")
@each(None, "tensorwise")
def test_muon(recipe, tmp_path, record_property):
    bound = REPEATED / 10
    record_property("found", te_engine_checks.check_resume(PLACE, tmp_path, recipe, bound, "optimizer.name=muon"))


def test_what_local_layers_saved_is_resumed(tmp_path, record_property):
    record_property("found", te_engine_checks.check_other_spec(PLACE, tmp_path))


@pytest.mark.parametrize("params", [False, True])
@each("delayed")
def test_what_is_no_step_leaves_no_trace_in_the_scales(recipe, params, record_property):
    settings = ("precision.fp8_params=true",) if params else ()
    record_property("found", te_engine_checks.check_no_trace(PLACE, REPEATED / 10, *settings))


def test_products_add_to_the_gradient(record_property):
    record_property("found", te_engine_checks.check_fused_gradients(PLACE))


@pytest.mark.parametrize("recompute", [False, True])
@each(None, "delayed", "tensorwise")
def test_memory(recipe, recompute, record_property):
    shape = ("data.sequence_length=1024",) if on_gpu else te_checks.UNFUSED_ATTENTION
    found = te_engine_checks.check_memory(PLACE, 0.05, BF16, *shape, *fp8(recipe), recompute=recompute)
    record_property("found", found)


@each(None, "tensorwise")
def test_packed_documents(recipe, record_property):
    """In bf16 the kernels of packed and plain attention round differently; FP8 scales are those of all documents, so
    roundings are independent."""
    bound = te_checks.FP8_LOGITS if recipe else te_checks.BF16_LOGITS
    record_property("found", te_checks.check_packed(PLACE, [48, 64, 16], bound, BF16, *fp8(recipe)))
