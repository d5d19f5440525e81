from engram.v1 import memory_pb2 as _memory_pb2
from engram.v1 import session_pb2 as _session_pb2
from engram.v1 import stream_pb2 as _stream_pb2
from google.protobuf import descriptor as _descriptor
from typing import ClassVar as _ClassVar

DESCRIPTOR: _descriptor.FileDescriptor
