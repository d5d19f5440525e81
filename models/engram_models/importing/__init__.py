"""Other people's models: read, understood, brought to the normal form, proved and written as bundles. No torch.

importer   the whole import of a file, in order
reading    a stranger's .onnx file in bounded memory and time: wire before it is parsed, tensors and topology after it
roles      what each tensor is: names, pairing, flags, initial, axes; proposal and table hold and show it
normal_form  the graph as bundles have it: edit, nodes
proof      what is shown of such a graph before it is served: trials of rows, replay of a recorded run
sandbox    whatever runs a stranger's graph, or his code (convert), does so in a process with limits
errors     ImportRefusedError, one line
"""
