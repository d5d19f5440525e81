"""`engram bench`: what a server does under closed-loop load, beside plain ONNX Runtime, torch and a plain server, in one run."""
