"""The fewest bytes that a pipeline can send, found by following every source from its maker to its farthest reader.

Written from the method's definition and Megatron's placement of chunks alone; nothing of the package is used.
"""

from __future__ import annotations

from collections import Counter
from itertools import accumulate

from tests.parallel.cases import MODEL, SEQUENCE_LENGTH, SUBLAYERS_A_SNAPSHOT, TRAIN, Job, Layout


def least_bytes(job: Job, layout: Layout, num_microbatches: int, *, earlier_selves: bool = True) -> dict[str, int]:
    """Bytes from stage to stage ("0>1") of one global batch, forward and backward, on one pipeline in fp32.

    ``earlier_selves``: a looped model's layers read themselves in the loops before, as the paper has it.
    """
    parallel = layout.parallel
    stages, chunks = parallel.pipeline, parallel.pipeline * parallel.virtual_pipeline
    num_layers = MODEL.num_layers // job.loops * job.loops
    cut = layout.cut or (num_layers // chunks,) * chunks
    stage_of = [chunk % stages for chunk, layers in enumerate(cut) for _ in range(layers)]
    before = list(accumulate(cut))
    tokens = TRAIN.micro_batch_size * SEQUENCE_LENGTH // parallel.context
    # A tensor rank holds whole heads of every token; its hidden states are those of its share of the tokens.
    hidden = tokens * MODEL.hidden_size // (parallel.tensor if parallel.sequence else 1)
    # The key that scores, if any does, and what is mixed.
    tensors = (job.weights == "softmax") + {"value": 1, "key": 1, "key_value": 2}[job.mixes]
    source = tokens * tensors * max(1, MODEL.num_query_groups // parallel.tensor) * MODEL.kv_channels
    if job.method != "depth_attention":
        source = hidden  # other methods read hidden states

    numbers: Counter[str] = Counter()

    def cross(stage: int, count: int) -> None:
        there = (stage + 1) % stages
        numbers[f"{stage}>{there}"] += count
        numbers[f"{there}>{stage}"] += count  # its gradient

    for chunk in range(chunks - 1):
        is_inside = 0 < before[chunk] < num_layers  # else the embedding crosses, or what the last layer has made
        cross(chunk % stages, 4 * hidden if job.method == "mhc" and is_inside else hidden)
    for layer in range(num_layers):
        readers = [
            later for later in range(layer + 1, num_layers) if _reads(job, later, layer, num_layers, earlier_selves)
        ]
        farthest = max(((stage_of[reader] - stage_of[layer]) % stages for reader in readers), default=0)
        for step in range(farthest):
            cross((stage_of[layer] + step) % stages, source)
    return {edge: 4 * num_microbatches * count for edge, count in numbers.items()}


def _reads(job: Job, layer: int, earlier: int, num_layers: int, earlier_selves: bool) -> bool:
    """Whether ``layer`` reads what was left where ``earlier`` stands; of other methods, the input of ``earlier``."""
    if job.method == "denseformer":
        return True
    if job.method == "attnres":
        return 2 * earlier % SUBLAYERS_A_SNAPSHOT == 0
    if job.method == "mhc":
        return False
    if job.loops > 1 and not job.unrolled:
        a_loop = num_layers // job.loops
        if layer // a_loop != earlier // a_loop:
            return earlier_selves and (layer - earlier) % a_loop == 0
        earlier, layer = earlier % a_loop, layer % a_loop
    return earlier % job.stride == 0 or layer - job.window <= earlier
