"""The benchmark harness behind `moe-engine bench`: measures speeds as llama-bench does, and says what limits them.

plan         what to run: the product of the options, and the order
runner       one contender after the other, in turns; samples to result rows
peers        other programs as contenders on the same file
random_model full-size models with random weights
compare      whether one result file is slower than another
plots        pictures and a Perfetto trace from a result file
"""
