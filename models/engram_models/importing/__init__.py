"""Other people's models: read, understood, brought to the normal form, proved and written as bundles. No torch.

errors    ImportRefused
reading   a stranger's .onnx file in bounded memory and time
wire      what is counted in such a file before it is parsed
sandbox   whatever runs a stranger's graph does so in a process with limits
proof     what is shown of a graph in normal form before it is served
"""
