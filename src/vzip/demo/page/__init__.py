"""The page on which people try compression: `python -m vzip demo serve`.

`studio` asks the model, `visits` is what each visitor has open, `page` what comes of what they do; `widgets`, the only
file that knows Gradio, puts it on the screen.
"""
