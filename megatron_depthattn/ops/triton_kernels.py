"""The GPU kernels behind `triton_mix.py`, which explains them. Importing this file needs Triton.

A program works on ROWS rows; a row is one token's one key/value head: row = token * NUM_GROUPS + head, and
token = i * second_size + j for the leading shape [first, second]. Tiles are [ROWS, WIDTH] in fp32: the head size,
padded to a power of two. The padding is masked in every load and store.

`entries` describes the candidates, sources in order and then the layer itself, FIELDS integers for each: address and
three strides (first, second, head) of its key, the same of its value, and in backward the addresses of their
gradients, 0 where none is wanted. With IN_ARGUMENTS = n it is a tuple for n candidates and loops are unrolled; with
IN_ARGUMENTS = 0 it is a table in GPU memory for num_candidates of them.
"""

import torch
import triton
import triton.language as tl

DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@triton.jit(do_not_specialize=["num_rows", "num_candidates"])  # else another compilation for multiples of 16
def forward_kernel(
    q,
    mixed,
    entries,
    scale,
    num_rows,
    num_candidates,
    second_size,
    q_first,
    q_second,
    q_head,
    FIELDS: tl.constexpr,
    IN_ARGUMENTS: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
    KEY_DTYPE: tl.constexpr,
    VALUE_DTYPE: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    HEADS_PER_GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """mixed [tokens, NUM_GROUPS, HEAD_DIM], contiguous, by an online softmax over the candidates."""
    rows, first, second, head, columns, mask = _place(num_rows, second_size, NUM_GROUPS, HEAD_DIM, WIDTH, ROWS)
    query_rows = first * q_first + second * q_second + head * HEADS_PER_GROUP * q_head
    qbar = _group_mean(q, query_rows, q_head, columns, mask, HEADS_PER_GROUP, WIDTH, ROWS)

    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    weighted = tl.zeros([ROWS, WIDTH], tl.float32)
    if IN_ARGUMENTS:
        for i in tl.static_range(IN_ARGUMENTS):
            largest, total, weighted = _forward_step(
                i * FIELDS, entries, qbar, largest, total, weighted, scale, first, second, head, columns, mask,
                IN_ARGUMENTS, IS_ALIGNED, KEY_DTYPE, VALUE_DTYPE,
            )  # fmt: skip
    else:
        for i in range(num_candidates):
            largest, total, weighted = _forward_step(
                i * FIELDS, entries, qbar, largest, total, weighted, scale, first, second, head, columns, mask,
                IN_ARGUMENTS, IS_ALIGNED, KEY_DTYPE, VALUE_DTYPE,
            )  # fmt: skip
    result = weighted / total[:, None]
    tl.store(mixed + (rows * HEAD_DIM)[:, None] + columns, result.to(mixed.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows", "num_candidates"])
def backward_kernel(
    q,
    grad_mixed,
    grad_q,
    entries,
    scale,
    num_rows,
    num_candidates,
    second_size,
    q_first,
    q_second,
    q_head,
    g_first,
    g_second,
    g_head,
    FIELDS: tl.constexpr,
    IN_ARGUMENTS: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
    KEY_DTYPE: tl.constexpr,
    VALUE_DTYPE: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    HEADS_PER_GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    NEEDS_Q: tl.constexpr,
):
    """Gradients, contiguous: grad_q [tokens, NUM_GROUPS * HEADS_PER_GROUP, HEAD_DIM] with NEEDS_Q, and those that
    `entries` has an address for. SLOTS: at least the number of candidates, a power of two."""
    rows, first, second, head, columns, mask = _place(num_rows, second_size, NUM_GROUPS, HEAD_DIM, WIDTH, ROWS)
    query_rows = first * q_first + second * q_second + head * HEADS_PER_GROUP * q_head
    qbar = _group_mean(q, query_rows, q_head, columns, mask, HEADS_PER_GROUP, WIDTH, ROWS)
    grad_rows = first * g_first + second * g_second + head * g_head
    grad = tl.load(grad_mixed + grad_rows[:, None] + columns, mask=mask, other=0.0).to(tl.float32)

    # One number for each row and candidate; a candidate's column is picked by comparing with its slot.
    slots = tl.arange(0, SLOTS)[None, :]
    scores = tl.full([ROWS, SLOTS], float("-inf"), tl.float32)
    grad_weights = tl.zeros([ROWS, SLOTS], tl.float32)
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    sum_key = tl.zeros([ROWS, WIDTH], tl.float32)
    sum_grad_key = tl.zeros([ROWS, WIDTH], tl.float32)
    if IN_ARGUMENTS:
        for i in tl.static_range(IN_ARGUMENTS):
            scores, grad_weights, largest, sum_key, sum_grad_key = _backward_step(
                i, i * FIELDS, entries, qbar, grad, slots, scores, grad_weights, largest, sum_key, sum_grad_key,
                scale, first, second, head, columns, mask, IN_ARGUMENTS, IS_ALIGNED, KEY_DTYPE, VALUE_DTYPE, NEEDS_Q,
            )  # fmt: skip
    else:
        for i in range(num_candidates):
            scores, grad_weights, largest, sum_key, sum_grad_key = _backward_step(
                i, i * FIELDS, entries, qbar, grad, slots, scores, grad_weights, largest, sum_key, sum_grad_key,
                scale, first, second, head, columns, mask, IN_ARGUMENTS, IS_ALIGNED, KEY_DTYPE, VALUE_DTYPE, NEEDS_Q,
            )  # fmt: skip

    weights = tl.exp(scores - tl.max(scores, axis=1)[:, None])
    total = tl.sum(weights, axis=1)
    weights = weights / total[:, None]
    mean = tl.sum(weights * grad_weights, axis=1)
    grad_scores = scale * weights * (grad_weights - mean[:, None])
    if NEEDS_Q:
        of_a_head = (scale / HEADS_PER_GROUP) * (sum_grad_key - mean[:, None] * sum_key) / total[:, None]
        for i in tl.static_range(HEADS_PER_GROUP):
            places = grad_q + ((rows * HEADS_PER_GROUP + i) * HEAD_DIM)[:, None] + columns
            tl.store(places, of_a_head.to(grad_q.dtype.element_ty), mask=mask)
    own_rows = rows * HEAD_DIM
    if IN_ARGUMENTS:
        for i in tl.static_range(IN_ARGUMENTS):
            _store_gradients(
                i, i * FIELDS, entries, qbar, grad, slots, weights, grad_scores, own_rows, columns, mask,
                IN_ARGUMENTS, IS_ALIGNED, KEY_DTYPE, VALUE_DTYPE,
            )  # fmt: skip
    else:
        for i in range(num_candidates):
            _store_gradients(
                i, i * FIELDS, entries, qbar, grad, slots, weights, grad_scores, own_rows, columns, mask,
                IN_ARGUMENTS, IS_ALIGNED, KEY_DTYPE, VALUE_DTYPE,
            )  # fmt: skip


@triton.jit
def _place(
    num_rows, second_size,
    NUM_GROUPS: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """This program's rows, their place in the leading shape and their head (64 bits: they are factors of offsets),
    the columns [1, WIDTH], and where both are real [ROWS, WIDTH]."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH)[None, :]
    mask = (rows < num_rows)[:, None] & (columns < HEAD_DIM)
    token = rows // NUM_GROUPS
    head = (rows % NUM_GROUPS).to(tl.int64)
    return (
        rows.to(tl.int64),
        (token // second_size).to(tl.int64),
        (token % second_size).to(tl.int64),
        head,
        columns,
        mask,
    )


@triton.jit
def _group_mean(
    q, query_rows, q_head, columns, mask, HEADS_PER_GROUP: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr
):
    """Mean [ROWS, WIDTH] over the query heads of each row's key/value head; `query_rows`: where the first begins."""
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    for i in tl.static_range(HEADS_PER_GROUP):
        total += tl.load(q + (query_rows + i * q_head)[:, None] + columns, mask=mask, other=0.0).to(tl.float32)
    return total / HEADS_PER_GROUP


@triton.jit
def _forward_step(
    field, entries, qbar, largest, total, weighted, scale, first, second, head, columns, mask,
    IN_ARGUMENTS: tl.constexpr, IS_ALIGNED: tl.constexpr, KEY_DTYPE: tl.constexpr, VALUE_DTYPE: tl.constexpr,
):  # fmt: skip
    """The online softmax after one more candidate: the largest score, the sum of weights and of weighted values."""
    key = _read(entries, field, first, second, head, columns, mask, IN_ARGUMENTS, IS_ALIGNED, KEY_DTYPE)
    value = _read(entries, field + 4, first, second, head, columns, mask, IN_ARGUMENTS, IS_ALIGNED, VALUE_DTYPE)
    score = scale * tl.sum(qbar * key, axis=1)
    new_largest = tl.maximum(largest, score)
    shrink, weight = tl.exp(largest - new_largest), tl.exp(score - new_largest)
    return new_largest, total * shrink + weight, weighted * shrink[:, None] + weight[:, None] * value


@triton.jit
def _backward_step(
    i, field, entries, qbar, grad, slots, scores, grad_weights, largest, sum_key, sum_grad_key,
    scale, first, second, head, columns, mask,
    IN_ARGUMENTS: tl.constexpr, IS_ALIGNED: tl.constexpr, KEY_DTYPE: tl.constexpr, VALUE_DTYPE: tl.constexpr,
    NEEDS_Q: tl.constexpr,
):  # fmt: skip
    """One more candidate's score and gradient of its weight, and the two sums that the query's gradient is made of,
    both relative to exp(largest): of weight * key, and of weight * grad_weight * key."""
    key = _read(entries, field, first, second, head, columns, mask, IN_ARGUMENTS, IS_ALIGNED, KEY_DTYPE)
    value = _read(entries, field + 4, first, second, head, columns, mask, IN_ARGUMENTS, IS_ALIGNED, VALUE_DTYPE)
    score = scale * tl.sum(qbar * key, axis=1)
    grad_weight = tl.sum(grad * value, axis=1)
    scores = tl.where(slots == i, score[:, None], scores)
    grad_weights = tl.where(slots == i, grad_weight[:, None], grad_weights)
    if NEEDS_Q:
        new_largest = tl.maximum(largest, score)
        shrink = tl.exp(largest - new_largest)[:, None]
        weighted_key = tl.exp(score - new_largest)[:, None] * key
        sum_key = sum_key * shrink + weighted_key
        sum_grad_key = sum_grad_key * shrink + grad_weight[:, None] * weighted_key
        largest = new_largest
    return scores, grad_weights, largest, sum_key, sum_grad_key


@triton.jit
def _store_gradients(
    i, field, entries, qbar, grad, slots, weights, grad_scores, own_rows, columns, mask,
    IN_ARGUMENTS: tl.constexpr, IS_ALIGNED: tl.constexpr, KEY_DTYPE: tl.constexpr, VALUE_DTYPE: tl.constexpr,
):  # fmt: skip
    """Gradients of one candidate's key and value, each if it has an address to go to."""
    grad_score = tl.sum(tl.where(slots == i, grad_scores, 0.0), axis=1)
    weight = tl.sum(tl.where(slots == i, weights, 0.0), axis=1)
    grad_key = _field(entries, field + 8, IN_ARGUMENTS)
    if grad_key != 0:
        places = _pointers(grad_key, own_rows, columns, IS_ALIGNED, KEY_DTYPE)
        tl.store(places, (grad_score[:, None] * qbar).to(KEY_DTYPE), mask=mask)
    grad_value = _field(entries, field + 9, IN_ARGUMENTS)
    if grad_value != 0:
        places = _pointers(grad_value, own_rows, columns, IS_ALIGNED, VALUE_DTYPE)
        tl.store(places, (weight[:, None] * grad).to(VALUE_DTYPE), mask=mask)


@triton.jit
def _read(
    entries, field, first, second, head, columns, mask,
    IN_ARGUMENTS: tl.constexpr, IS_ALIGNED: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The tile of the tensor whose address and strides begin at `field`, in fp32."""
    offsets = first * _field(entries, field + 1, IN_ARGUMENTS)
    offsets += second * _field(entries, field + 2, IN_ARGUMENTS)
    offsets += head * _field(entries, field + 3, IN_ARGUMENTS)
    places = _pointers(_field(entries, field, IN_ARGUMENTS), offsets, columns, IS_ALIGNED, DTYPE)
    return tl.load(places, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _field(entries, index, IN_ARGUMENTS: tl.constexpr):
    """One integer of `entries`."""
    if IN_ARGUMENTS:
        return entries[index]
    else:
        return tl.load(entries + index)


@triton.jit
def _pointers(address, offsets, columns, IS_ALIGNED: tl.constexpr, DTYPE: tl.constexpr):
    """Where rows at `offsets` elements from an address have their elements. IS_ALIGNED: every row begins at a multiple
    of 16 bytes, which the compiler cannot know of an address in an integer and needs to know for wide loads."""
    places = address.to(tl.int64).to(tl.pointer_type(DTYPE)) + offsets[:, None] + columns
    if IS_ALIGNED:
        places = tl.multiple_of(places, [1, 16])
    return places


ARE_INTERPRETED = not isinstance(forward_kernel, triton.runtime.JITFunction)
"""TRITON_INTERPRET=1 was set when this file was imported: the kernels run on CPU, by numpy."""
