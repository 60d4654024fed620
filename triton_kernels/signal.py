"""Signals between ranks in Triton: the protocol of docs/gpu_kernels.md; nothing else in here publishes or waits.

A channel (pypar/channel.py) is addressed by `pointers`, a table [WORLD] of int64 addresses. No inline assembly, so that
all of it runs in the interpreter, across processes.
"""

import triton
import triton.language as tl

# The layout of a channel in words of 4 bytes; pypar/channel.py says what they are, a test holds the two together.
HEADER_WORDS: tl.constexpr = tl.constexpr(16)
EPOCH: tl.constexpr = tl.constexpr(0)
DONE: tl.constexpr = tl.constexpr(1)
ABORT: tl.constexpr = tl.constexpr(2)
ABORT_FOR: tl.constexpr = tl.constexpr(256)
ERROR: tl.constexpr = tl.constexpr(3)


@triton.jit
def words_of(pointers, rank):
    """The words of a rank's channel."""
    return tl.load(pointers + rank).to(tl.pointer_type(tl.int32))


@triton.jit
def full_flag(words, source, chunk, call, WORLD: tl.constexpr, CHUNKS: tl.constexpr):
    """In the consumer's channel: `source` has written its piece `chunk` of call number `call`."""
    return words + HEADER_WORDS + ((call & 1) * WORLD + source) * CHUNKS + chunk


@triton.jit
def empty_flag(words, consumer, call, WORLD: tl.constexpr, CHUNKS: tl.constexpr):
    """In the producer's channel: `consumer` has read all that the producer wrote to it for call number `call`."""
    return words + HEADER_WORDS + 2 * WORLD * CHUNKS + (call & 1) * WORLD + consumer


@triton.jit
def slot_of(words, call, slot_bytes, WORLD: tl.constexpr, CHUNKS: tl.constexpr):
    """The slot of call number `call`, as a pointer to bytes."""
    offset: tl.constexpr = ((HEADER_WORDS + 2 * WORLD * CHUNKS + 2 * WORLD) * 4 + 255) // 256 * 256
    return words.to(tl.pointer_type(tl.int8)) + offset + (call & 1).to(tl.int64) * slot_bytes


@triton.jit
def this_call(words):
    """The number of the call that runs now: one more than those that are over. Modulo 2^32, as all epochs."""
    return tl.add(tl.load(words + EPOCH, volatile=False), 1, sanitize_overflow=False)


@triton.jit
def lead(flag_value, call):
    """By how many calls a flag is ahead of `call`. Both wrap, at which debug mode and the interpreter would stop."""
    return tl.sub(flag_value, call, sanitize_overflow=False)


@triton.jit
def publish(flag, call):
    """Everything that this program has stored is visible at system scope before the flag is."""
    tl.debug_barrier()
    tl.atomic_xchg(flag, call, sem="release", scope="sys")


@triton.jit
def wait(flag, call, pointers, rank, code, peer, index, polls, WORLD: tl.constexpr):
    """Spins until the flag has reached `call`; what was stored before it was published can be read then.

    Gives up, and returns False, after `polls` looks or when a peer gave up: the error is written down, every peer is
    told, and the caller must store nothing it has read. Who was told by a peer names whom that one waited for.
    """
    words = words_of(pointers, rank)
    left = polls
    told = 0
    seen = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
    while (lead(seen, call) < 0) & (left > 0):
        seen = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
        told = tl.atomic_add(words + ABORT, 0, sem="relaxed", scope="sys")
        left = tl.where(told != 0, 0, left - 1)
    arrived = lead(seen, call) >= 0
    if not arrived:
        culprit = tl.where(told == 0, peer, tl.where(told >= ABORT_FOR, told - ABORT_FOR, -1))
        if tl.atomic_cas(words + ERROR, 0, tl.where(told == 0, code, 3), sem="relaxed", scope="gpu") == 0:
            tl.store(words + ERROR + 1, culprit)
            tl.store(words + ERROR + 2, index)
            tl.store(words + ERROR + 3, call)
        for other in range(WORLD):
            tl.atomic_xchg(words_of(pointers, other) + ABORT, culprit + ABORT_FOR, sem="release", scope="sys")
    tl.debug_barrier()
    return arrived


@triton.jit
def wait_empty(pointers, rank, call, polls, WORLD: tl.constexpr, CHUNKS: tl.constexpr):
    """Until every peer has read what this rank wrote for call - 2, whose slot call number `call` is about to reuse."""
    words = words_of(pointers, rank)
    free = True
    for peer in range(WORLD):
        flag = empty_flag(words, peer, call, WORLD, CHUNKS)
        free = free & wait(flag, lead(call, 2), pointers, rank, 2, peer, 0, polls, WORLD)
    return free


@triton.jit
def finish(pointers, rank, call, programs, WORLD: tl.constexpr, CHUNKS: tl.constexpr):
    """Called by every program of the op's last kernel when it has read all it needs: the last one to arrive tells every
    peer that its slot is empty and ends the call."""
    words = words_of(pointers, rank)
    tl.debug_barrier()
    arrived = tl.atomic_add(words + DONE, 1, sem="acq_rel", scope="gpu") + 1
    if arrived == programs:
        tl.store(words + DONE, 0)
        for peer in range(WORLD):
            flag = empty_flag(words_of(pointers, peer), rank, call, WORLD, CHUNKS)
            tl.atomic_xchg(flag, call, sem="release", scope="sys")
        tl.store(words + EPOCH, call)
