"""The shared library of CPU kernels, through ctypes: its structures, and where it is.

kernels/cpu/motley.h says what each field means; the names are the same.
"""

from __future__ import annotations

import ctypes
import sysconfig
from ctypes import POINTER, Structure, Union, c_char_p, c_float, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path


class Act(Structure):
    _fields_ = (
        ("q", ctypes.c_int8 * 32),
        ("d", c_float),
        ("fine", c_float),
        ("sum", c_float),
        ("half", c_float * 2),
        ("rest", ctypes.c_int8 * 32),
    )


class MatrixStruct(Structure):
    _fields_ = (
        ("format", c_int32),
        ("outputs", c_int32),
        ("inputs", c_int32),
        ("data", c_void_p),
    )


class KvLayer(Structure):
    _fields_ = (("type", c_int32), ("keys", c_void_p), ("values", c_void_p))


class Heads(Structure):
    _fields_ = (("queries", c_int32), ("keys", c_int32), ("dim", c_int32))


class EmbedOp(Structure):
    _fields_ = (("table", MatrixStruct), ("out", c_void_p))


class AnglesOp(Structure):
    _fields_ = (
        ("frequencies", c_void_p),
        ("out", c_void_p),
        ("head_dim", c_int32),
        ("magnitude", c_float),
    )


class NormOp(Structure):
    _fields_ = (
        ("in_", c_void_p),
        ("weight", c_void_p),
        ("out", c_void_p),
        ("width", c_int32),
        ("eps", c_float),
    )


class RowsOp(Structure):
    """QuantiseOp, SiluOp and GatherOp: the same fields."""

    _fields_ = (("in_", c_void_p), ("out", c_void_p), ("width", c_int32))


class MatmulOp(Structure):
    _fields_ = (
        ("matrix", MatrixStruct),
        ("in_", c_void_p),
        ("out", c_void_p),
        ("stride", c_int32),
        ("add", c_int32),
    )


class RopeOp(Structure):
    _fields_ = (
        ("qkv", c_void_p),
        ("angles", c_void_p),
        ("bias", c_void_p),
        ("query_norm", c_void_p),
        ("key_norm", c_void_p),
        ("eps", c_float),
        ("heads", Heads),
        ("cache", KvLayer),
    )


class AttentionOp(Structure):
    _fields_ = (
        ("qkv", c_void_p),
        ("out", c_void_p),
        ("heads", Heads),
        ("cache", KvLayer),
        ("window", c_int32),
    )


class SumOp(Structure):
    _fields_ = (("in_", c_void_p), ("out", c_void_p), ("count", c_int64))


class MarkOp(Structure):
    _fields_ = (("mark", c_void_p), ("value", c_int32))


class RoutingStruct(Structure):
    _fields_ = (
        ("experts", c_int32),
        ("used", c_int32),
        ("chosen", c_void_p),
        ("weights", c_void_p),
        ("place", c_void_p),
        ("start", c_void_p),
    )


class RouteOp(Structure):
    _fields_ = (
        ("in_", c_void_p),
        ("matrix", c_void_p),
        ("routing", RoutingStruct),
        ("width", c_int32),
        ("eps", c_float),
        ("sum_to_one", c_int32),
    )


class GroupOp(Structure):
    _fields_ = (("routing", RoutingStruct),)


class SpreadOp(Structure):
    _fields_ = (
        ("in_", c_void_p),
        ("out", c_void_p),
        ("routing", RoutingStruct),
        ("width", c_int32),
    )


class ExpertsOp(Structure):
    _fields_ = (
        ("matrices", c_void_p),
        ("in_", c_void_p),
        ("out", c_void_p),
        ("routing", RoutingStruct),
        ("stride", c_int32),
    )


class CombineOp(Structure):
    _fields_ = (
        ("in_", c_void_p),
        ("out", c_void_p),
        ("routing", RoutingStruct),
        ("width", c_int32),
        ("add", c_int32),
    )


class OpUnion(Union):
    _fields_ = (
        ("embed", EmbedOp),
        ("angles", AnglesOp),
        ("norm", NormOp),
        ("quantise", RowsOp),
        ("silu", RowsOp),
        ("matmul", MatmulOp),
        ("rope", RopeOp),
        ("attention", AttentionOp),
        ("gather", RowsOp),
        ("sum", SumOp),
        ("mark", MarkOp),
        ("route", RouteOp),
        ("group", GroupOp),
        ("spread", SpreadOp),
        ("experts", ExpertsOp),
        ("combine", CombineOp),
    )


OP_STRUCTS = dict(OpUnion._fields_)
OP_KINDS = {name: number for number, name in enumerate(OP_STRUCTS)}


class Op(Structure):
    _fields_ = (("kind", c_int32), ("wait", c_int32), ("of", OpUnion))


class BatchStruct(Structure):
    _fields_ = (
        ("rows", c_int32),
        ("spans", c_int32),
        ("drawn", c_int32),
        ("tokens", c_void_p),
        ("span", c_void_p),
        ("tables", c_void_p),
        ("drawn_rows", c_void_p),
    )


def path() -> Path:
    """Where the installation puts the library, if it could build it."""
    return Path(__file__).parent / "cpu" / f"library{sysconfig.get_config_var('EXT_SUFFIX')}"


@cache
def load() -> ctypes.CDLL:
    """The library, its functions typed. Raises OSError if it is not there or not for this system.

    Calls let go of Python's global lock.
    """
    library = ctypes.CDLL(str(path()))
    library.motley_instruction_sets.restype = c_char_p
    library.motley_pool_new.argtypes = [c_int32, c_char_p]
    library.motley_pool_new.restype = c_void_p
    library.motley_pool_free.argtypes = [c_void_p]
    library.motley_pool_free.restype = None
    library.motley_run.argtypes = [c_void_p, c_void_p, c_int32, POINTER(BatchStruct)]
    library.motley_run.restype = None
    library.motley_packed_bytes.argtypes = [c_int32, c_int32, c_int32]
    library.motley_packed_bytes.restype = c_int64
    library.motley_pack.argtypes = [c_int32, c_int32, c_int32, c_void_p, c_void_p]
    library.motley_pack.restype = None
    library.motley_unpack.argtypes = [POINTER(MatrixStruct), c_int32, c_int32, c_void_p]
    library.motley_unpack.restype = None
    shape = [c_int32, c_int32, c_int32]
    library.motley_kv_encode.argtypes = [c_int32, c_void_p, *shape, c_void_p, c_void_p, c_int64]
    library.motley_kv_encode.restype = c_int64
    library.motley_kv_decode.argtypes = [c_int32, c_void_p, c_int64, *shape, c_void_p]
    library.motley_kv_decode.restype = c_int32
    return library
