"""What names say: which output is the next value of which input, what is data, what is time. For pairing.py and choices.py.

A name is cut into words (`new_cached_key_0`, `stateN`, `hiddenOut`). Words of direction (in, out, prev, next) are what the two
names of a state may differ in; whatever else differs makes them two tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

Words = tuple[str, ...]

_IN = "in input inputs inp prev previous past old last initial init cur current before pre begin from"
_OUT = (
    "r ret returned out output outputs outp new next nxt present updated update upd after final post end to cur current"
)
_STRONG = "prev previous past old next nxt new present updated update"  # these mean time, and not a direction
_DATA = """x u y audio frame frames signal wav wave waveform pcm mag magnitude phase spec spectrum spectra feat feats feature
    features obs observation observations data sample samples token tokens ids id image img pixels chunk speech mel fbank mfcc
    noisy enhanced denoised clean logits action actions prob probs probability sequence seq text mix mixture stft real imag
    values value series query target label labels score scores result goal command reward sensor sensors prices price
    measurement measurements dt delta gap forecast prediction pred estimate gain gains mask vad
    offsets level levels pose poses velocity speed temperature joint joints imu lidar depth rgb pixels embedding embeddings emb
    control controls torque load demand volume angle angles gyro event events class classes flags params condition cond
    speaker spk language lang style pitch energy power boundary boundaries image images vector features click item
    src source sig fgr pha foreground alpha matte"""
_STATE = """h c s state states hidden hiddens cell cells cache caches cached mem memory memories buf buffer buffers carry rnn
    lstm gru ctx context ssm hx cx hn cn kv key val keys history hist counter count recurrent past present hid st hs cs"""
_TIME = (
    "t time times timestep timesteps seq sequence seqlen len length lens frame frames step steps chunk samples tokens"
)
_BATCH = "n b bs bz bsz batch batches batchsize nbatch streams stream sessions envs"
_EMPTY = "input inputs output outputs onnx identity stateful partitioned call arg result node tensor"
_IN_WORDS, _OUT_WORDS, _STRONG_WORDS = (frozenset(text.split()) for text in (_IN, _OUT, _STRONG))
_DATA_WORDS, _STATE_WORDS, _TIME_WORDS = (frozenset(text.split()) for text in (_DATA, _STATE, _TIME))
_BATCH_WORDS, _EMPTY_WORDS = (frozenset(text.split()) for text in (_BATCH, _EMPTY))
_LENGTH_WORDS = frozenset(("len", "lens", "length", "lengths", "seqlen"))
_RATE_WORDS = frozenset(("sr", "rate", "fs", "samplerate", "hz"))
_IN_TAILS: tuple[Words, ...] = ((), ("0",), ("t", "1"), ("tm", "1"), ("t",), ("t", "0"))
_OUT_TAILS: tuple[Words, ...] = ((), ("n",), ("t",), ("1",), ("t", "1"), ("tp", "1"), ("t", "n"))
_ENDS: tuple[tuple[Words, Words], ...] = ((("i",), ("o",)),)  # r1i, r1o
_PLACE = re.compile(r"_dynamic_axes_\d+$")
_KEY_VALUES: tuple[Words, ...] = (("past", "key", "values"), ("present", "key", "values"))
_AFFIXES = (  # of one word: (before the input's, after it, before the output's, after it)
    ("", "in", "", "out"), ("", "i", "", "o"), ("", "", "", "n"), ("", "", "", "out"), ("", "", "", "new"),
    ("", "", "", "next"), ("", "prev", "", ""), ("", "prev", "", "next"), ("", "", "n", ""), ("", "", "new", ""),
    ("", "", "next", ""), ("", "", "out", ""), ("in", "", "out", ""), ("i", "", "o", ""), ("prev", "", "next", ""),
    ("prev", "", "", ""), ("past", "", "present", ""), ("", "x", "", "y"),
)  # fmt: skip


def words(name: str) -> Words:
    """`serving_default_hIn:0` -> (h, in)."""
    plain = re.sub(r":\d+$", "", name)
    found = tuple(word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+", plain))
    return found[2:] if found[:2] == ("serving", "default") else found


def stem(name: str) -> Words:
    """Its words without direction and without numbers: what tensors of the same kind in several layers have in common."""
    return tuple(word for word in words(name) if word not in _IN_WORDS | _OUT_WORDS and not word.isdigit())


def names_pair(given: str, taken: str) -> int:
    """How clearly the input `given` and the output `taken` are one state by their names: 1 is the clearest, 0 is not at all."""
    ins, outs = _keys(_layers(words(given)), _IN_WORDS), _keys(_layers(words(taken)), _OUT_WORDS)
    if any(key in outs for key in ins):
        return 1
    if any(_cut(a, tail) == _cut(b, end) for a in ins for b in outs for tail, end in _tails() if _cut(a, tail)):
        return 2
    cut = {short for a in ins for tail in _IN_TAILS if (short := _cut(a, tail))}
    if any(_affixed(a, b) for a in cut for b in outs):
        return 3
    return 4 if any(_turned(a, b) for a in ins for b in outs) else 0


def _layers(said: Words) -> Words:
    """`past_key_values.0.key` and `present.0.key` are one layer's."""
    return (said[0], *said[3:]) if said[:3] in _KEY_VALUES and len(said) > 3 else said


def _turned(given: Words, taken: Words) -> bool:
    """Whether they are alike but for the order of words: `h_enc`, `enc_h`. Numbers keep theirs."""
    return sorted(given) == sorted(taken) and [w for w in given if w.isdigit()] == [w for w in taken if w.isdigit()]


def is_data(name: str) -> bool:
    """Whether it names what a model takes or gives, and nothing that it keeps. `input` does, `input_2` says nothing."""
    said = _said(name)
    if words(name) in (("input",), ("inputs",), ("output",), ("outputs",)):
        return True
    return any(word in _DATA_WORDS for word in said) and not any(word in _STATE_WORDS for word in said)


def says_nothing(name: str) -> bool:
    """Whether an exporter and not a person has chosen it: `input_3`, `onnx::Gemm_12`, `PartitionedCall_1`, `482`."""
    return not any(len(word) > 1 and not word.isdigit() and word not in _EMPTY_WORDS for word in words(name))


def is_kept(name: str) -> bool:
    return any(word in _STATE_WORDS for word in _said(name))


def says_time(name: str) -> bool:
    """Whether the words of direction in a name mean time: `prev_action`, `x_next`."""
    return any(word in _STRONG_WORDS for word in words(name))


def is_length(name: str) -> bool:
    return any(word in _LENGTH_WORDS for word in words(name))


def is_rate(name: str) -> bool:
    return any(word in _RATE_WORDS for word in words(name))


def is_batch_dim(name: str) -> bool:
    said = _said_of_dim(name)
    return any(word in _BATCH_WORDS for word in said) and not any(word in _TIME_WORDS - {"t"} for word in said)


def is_time_dim(name: str) -> bool:
    return any(word in _TIME_WORDS for word in _said_of_dim(name)) and not is_batch_dim(name)


def _said_of_dim(name: str) -> Words:
    """Nothing, where a tensor's name and a place are all that an exporter has written: `length_dynamic_axes_1`."""
    return () if name.startswith("?") or _PLACE.search(name) else words(name)


def _said(name: str) -> Words:
    return tuple(word for word in words(name) if word not in {"in", "out", "inp"} and not word.isdigit())


def _keys(said: Words, direction: Iterable[str]) -> set[Words]:
    return {key for key in (said, tuple(word for word in said if word not in direction)) if _meaning(key)}


def _meaning(key: Words) -> bool:
    """Two tensors that are called input and output, or 4 and 4, have nothing in common."""
    return any(not word.isdigit() and word not in _EMPTY_WORDS for word in key)


def _tails() -> Iterable[tuple[Words, Words]]:
    return (*((tail, end) for tail in _IN_TAILS for end in _OUT_TAILS if tail != end), *_ENDS)


def _cut(key: Words, tail: Words) -> Words | None:
    if not tail:
        return key
    return key[: -len(tail)] if key[-len(tail) :] == tail and len(key) > len(tail) else None


def _affixed(given: Words, taken: Words) -> bool:
    """Whether they are alike but for one word, which has an affix of direction: `hin0`, `hout0`."""
    if len(given) != len(taken):
        return False
    differing = [(a, b) for a, b in zip(given, taken, strict=True) if a != b]
    if len(differing) != 1:
        return False
    a, b = differing[0]
    for before, after, ahead, behind in _AFFIXES:
        if len(a) > len(before) + len(after) and a.startswith(before) and a.endswith(after):
            root = a[len(before) : len(a) - len(after)]
            if b == f"{ahead}{root}{behind}":
                return True
    return False
