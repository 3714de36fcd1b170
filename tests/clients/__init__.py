"""Other libraries as clients: each is used as its own users do, with LoRA as the control.

What they do to a LoRA adapter they must do to ours. Run with `-m clients`; needs the extra `clients`.
"""
