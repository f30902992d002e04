"""Shared memory that one program may use, by compute capability.

From the CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
"""

# A100, RTX 4090 and L40S, H100 and H200.
SHARED_MEMORY = {80: 166_912, 89: 101_376, 90: 232_448}  # bytes
