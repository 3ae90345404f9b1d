"""torchops inside other libraries' models, one module per library.

Each module imports its library, which stays optional: import the one you need, for example
``from torchops.integrations.timm import apply_token_merging``.
"""
