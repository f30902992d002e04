"""The parts of the command `ssl-pretrain`: its sub-commands, their help, lists and completion.

Only `reference_files`, which writes the generated files, imports torch.
"""
