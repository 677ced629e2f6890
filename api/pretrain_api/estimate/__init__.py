"""What a layout will take and give, estimated from shapes alone: no torch, no device, no clock.

:mod:`.memory` counts bytes of one rank, :mod:`.speed` divides work by what a GPU could do,
:mod:`.gpus` holds data sheets, and :mod:`.plan` ranks the legal layouts of a job by both. They are
estimates: memory is compared with what the trainer's own model allocates (``make check-memory``),
speed is a bound with assumed efficiencies, good for telling layouts apart.
"""
