"""What things cost (`benchmarks/speed/`) and what they gain (`benchmarks/claims/`): `python -m benchmarks`.

A benchmark is one module with a `BENCHMARK` (`benchmarks/benchmark.py`), named in `benchmarks/catalogue.py`. Such a
module imports neither torch nor matplotlib, so that --help is quick and the report needs no GPU; what measures is in a
module of its own and runs in a child process (`benchmarks/points.py`). Results are JSON files
(`benchmarks/result.py`), and `python -m benchmarks report` makes documents of them (`benchmarks/report.py`).
"""
