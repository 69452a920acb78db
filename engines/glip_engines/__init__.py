"""From a bundle's portable graphs to TensorRT engines.

    cli.py          the command `glip-build`
    options.py      what a build may be asked for, and how it is written on a command line
    plan.py         options checked against a bundle, every default filled in
    onnx_only.py    the rewritten graphs alone, for trtexec
    builder.py      the build itself: graph by graph into a folder that appears whole or not at all

    rewriting/      the portable graph as a version of TensorRT can read it and computes it well
    inspection.py   what a parser understood, compared with the graph

    flavours.py     TensorRT or TensorRT-RTX: which is installed, and for which GPU it builds
    support.py      which version of TensorRT supports which GPU
    trt.py          the one module that calls TensorRT (messages.py, progress.py)
    worker.py       a process of its own for it

    compile.py      the deformable convolution of `engines/plugin`, compiled once per machine (compilers.py)
    deform_abi.py   its C interface

Importing any of these loads neither TensorRT nor ONNX; functions do when they need it.
"""
