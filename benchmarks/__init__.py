"""What `benchmark.py` is made of: cases, timer, peers, report, plot and the suites that combine them."""
