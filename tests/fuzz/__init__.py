"""Fuzzing of everything that reads what others wrote: peers, callers, sandboxes, disks.

`targets/` has one function a decoder; each takes bytes, whatever they are, and raises nothing but
what the decoder is documented to raise. `inputs.py` and `shapes.py` make the bytes (sound
messages with hostile values in them, and sound ones that were damaged), `engine.py` runs them and
watches time and memory, `guided.py` does the same under atheris, which sees what each reached.
`corpus/` holds what was once found: each file is run again in each test run.

The short form is test_fuzz.py, a part of `make test`; the long one is `make fuzz`.
"""
