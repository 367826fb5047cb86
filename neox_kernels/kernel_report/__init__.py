"""What the compilers and a simulator say of the project's GPU kernels, without a GPU.

cases names the usual calls; compile and cuda turn them into machine code; sass, gcn and cards read that; simulate
counts what runs; rows brings the figures together; command and page show them.
"""
