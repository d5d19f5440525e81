"""Engram's own protocol, proto/engram/v1."""
