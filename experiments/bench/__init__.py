"""The bench: a train step through mpjax's public API against the same model by hand, in Flax and in PyTorch.

Question   is a wrapped step as fast, and as small, as what a careful user of JAX or of PyTorch writes by hand?
Rows       `rows.py` says what is compared: a row is a work (a model, its shapes) and its sides (who does it, and how).
Method     every side in a process of its own, so that its peak memory is its own and its compilation cold; nothing is
           compiled twice, nothing cached on disk. Steps run in blocks, of which only the last step is waited for; shown
           are the median of the blocks, and from the least to the largest. The loss of the first steps is kept: sides of
           one work must train alike. The rate of the device's own matrix products is measured in the same run.
Reads      step time, rate, TFLOP/s, their share of the product rate, peak memory, time to trace and to compile, the
           host's time a step. TFLOP/s count what the model needs (`flops.py`), not what a program computes again.
In turn    for ratios to a percent: `--in-turn flax mpjax` runs JAX sides in one process, their blocks in turn.
Devices    one; `scaling.py` runs the tuned GPT over several of one host, and says what moves between them.
Data       random tokens and pictures from the seed: speed does not depend on them. The same batch at every step.
Time       4 minutes a row on an H100; `--tiny` some seconds on a CPU, which says nothing of speed.
Run        python -m experiments.bench gpt2-bf16 --out FOLDER        one row: FOLDER/gpt2-bf16.json and a table
           python -m experiments.bench table FOLDER...               the tables of rows that were run, in Markdown
"""
