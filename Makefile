setup: ; pip install -e '.[demo,test]'
check: ; ruff check . && ruff format --check . && mypy
test: ; pytest
bench: ; python benchmarks/steps.py
