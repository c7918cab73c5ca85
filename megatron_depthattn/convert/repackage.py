"""A released checkpoint as a folder that transformers runs: the same weights with our model files."""

from pathlib import Path

from megatron_depthattn.convert.complete_folder import complete_folder
from megatron_depthattn.convert.from_hf import hf_groups, read_finite, tokenizer_of
from megatron_depthattn.convert.hf_writer import GENERATION_CONFIG, copy_files, write_model
from megatron_depthattn.hf.model_config import to_hf_config, to_model_section
from megatron_depthattn.hf.weights_folder import CONFIG, HFFolder


def repackage(source: HFFolder, output: Path, *, overwrite: bool = False) -> list[str]:
    """Write ``output`` from a checkpoint in the released layout.

    Unlike an import, this keeps the order in which the released code normalises keys, and so the exact function.

    Returns:
        What the user should know: lines about what was left out.

    Raises:
        ValueError: the checkpoint is no released one, or does not hold the model that it describes; the output exists
            or cannot be written.
    """
    kind = source.config.get("model_type")
    if kind != "llama":
        raise ValueError(
            f"{source.folder} has model_type={kind!r}, not the released layout: transformers loads it as it is"
        )
    model = to_model_section(source.config)
    if not model["depth_attention"]["enabled"]:
        raise ValueError(f"{source.folder} has use_depth_attention=false: there is nothing to repackage")
    names = [name for group in hf_groups(source, model) for name in group.hf]
    special_tokens = {f"{part}_token_id": source.config.get(f"{part}_token_id") for part in ("bos", "eos", "pad")}
    dtype = str(source.dtypes[names[0]]).removeprefix("torch.")
    config = to_hf_config(model, dtype=dtype, special_tokens=special_tokens)
    config["depth_attention_k_norm_after_rope"] = True
    sizes = {name: source.num_bytes(name) for name in names}
    tokenizer, notes = tokenizer_of(source)
    with complete_folder(
        output, marker=CONFIG, source=source.folder, num_bytes=sum(sizes.values()), overwrite=overwrite
    ) as folder:
        found = (source.folder, tokenizer) if tokenizer else None
        write_model(folder, config, sizes, lambda name: [(name, read_finite(source, name))], found)
        copy_files([source.folder / GENERATION_CONFIG], folder)
    return notes
