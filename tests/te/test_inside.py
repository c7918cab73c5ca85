"""Tests in processes that see TransformerEngine (inside.py), one by one as subtests of these.

Of tests/gpu/test_te.py here are those of every kind; ``make test-te`` runs all.
"""

import xml.etree.ElementTree as ElementTree

import pytest

from tests.te import stand_in

HOPPER = (
    *("test_bf16_parity", "test_recipe[delayed-stride 3]", "test_recipe[tensorwise-stride 1]"),
    *("test_recipe[blockwise-stride 3]", "test_recompute[delayed]", "test_recompute_of_a_looped_model"),
    *("test_recipe_of_other_methods[delayed-denseformer]", "test_weights_are_cast_anew[tensorwise]"),
    "test_first_and_last_layers_in_bf16[tensorwise]",
    *(f"test_the_optimizers_weights_are_those_drawn[{recipe}]" for recipe in ("None", "delayed", "blockwise")),
    *("test_fp8_attention[delayed]", "test_memory[delayed-False]", "test_memory[None-True]"),
    *("test_packed_documents[None]", "test_save_and_resume[delayed-False]"),
    "test_what_is_no_step_leaves_no_trace_in_the_scales[delayed-True]",
    *("test_what_local_layers_saved_is_resumed", "test_products_add_to_the_gradient"),
)
BLACKWELL = (
    *("test_recipe[mxfp8-stride 3]", "test_recipe_of_other_methods[mxfp8-mhc]", "test_recompute[mxfp8]"),
    *("test_weights_are_cast_anew[mxfp8]", "test_first_and_last_layers_in_bf16[mxfp8]"),
    *("test_fp8_attention[tensorwise]", "test_save_and_resume[tensorwise-True]"),
    "test_muon[tensorwise]",
)


PARTS = [
    f"tests/e2e/test_benchmarks.py::test_a_part_of_make_gpu[{part}]"
    for part in ("step-3b-delayed", "memory-fp8", "precision")
]


def of_gpu(names: tuple[str, ...]) -> list[str]:
    return [f"tests/gpu/test_te.py::{name}" for name in names]


RUNS = {
    "hopper": ("9.0", [*(f"tests/te/{name}.py" for name in ("statements", "faults", "captured")), *of_gpu(HOPPER)]),
    "blackwell": ("10.0", of_gpu(BLACKWELL)),
    "parts": ("9.0", PARTS),
}


@pytest.mark.parametrize("name", RUNS)
def test_inside(name, run_module, tmp_path, subtests):
    if stand_in.is_compiled():
        pytest.skip("this TransformerEngine has its kernels: tests/gpu runs with them, on a GPU")
    capability, tests = RUNS[name]
    report = tmp_path / "report.xml"
    done = run_module("tests.te.inside", "--capability", capability, "-q", f"--junitxml={report}", *tests)
    assert done.returncode in (0, 1), f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    cases = list(ElementTree.parse(report).iter("testcase"))
    assert len(cases) >= len(tests)
    for case in cases:
        with subtests.test(case.attrib["name"]):
            for child in case:
                if child.tag == "skipped":
                    pytest.skip(child.attrib["message"])
                if child.tag in ("failure", "error"):
                    pytest.fail(child.text or child.attrib["message"], pytrace=False)
