# make demo, make test and make check set up everything they need on a fresh machine.

VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
# One thread per process: two busy OpenMP pools on the same cores slow each other down tenfold.
TEST_ENV := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

.PHONY: demo test slow check bench audit lock image clean

demo: $(VENV)/ready
	HF_HUB_OFFLINE=1 $(BIN)/unlearn demo

# By file, so that what a file's tests share is made once.
test: $(VENV)/ready
	$(TEST_ENV) $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

slow: $(VENV)/ready
	$(TEST_ENV) $(BIN)/python -m pytest -m slow

# Ratios, with the machine to itself. TOFU=FOLDER adds the training step on real lengths and the
# evaluation, MODEL=FOLDER a model for it that has learned to end its answers.
bench: $(VENV)-bench/ready
	$(VENV)-bench/bin/python benchmarks/optimizer.py
	$(VENV)-bench/bin/python benchmarks/losses.py
	$(if $(TOFU),$(VENV)-bench/bin/python benchmarks/step.py --tofu $(TOFU))
	$(if $(TOFU),$(VENV)-bench/bin/python benchmarks/evaluation.py --tofu $(TOFU) \
		$(if $(MODEL),--model $(MODEL)))

check: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Known faults of what is pinned, from a database on the network. A package that it cannot be asked
# about is a fault, too.
audit: $(VENV)-audit/ready
	$(VENV)-audit/bin/pip-audit --strict --disable-pip --require-hashes \
		-r docker/locks/ci.lock -r docker/locks/cuda.lock

lock:
	docker/locks/lock.sh

# Builds the image for CPUs and lets it run the demo without a network.
image:
	docker build -f docker/Dockerfile --target cpu -t unlearn_llm:cpu .
	docker run --rm --network none unlearn_llm:cpu demo

# Every file is compared with its hash, but for torch, whose build depends on the machine.
$(VENV)/ready: pyproject.toml constraints.txt docker/locks/ci.lock
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --require-hashes --no-deps -r docker/locks/ci.lock
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

$(VENV)-audit/ready:
	$(PYTHON) -m venv $(VENV)-audit
	$(VENV)-audit/bin/python -m pip install --quiet pip-audit==2.10.1
	touch $@

# Apart from the other one, because torchao prints warnings at every later import of transformers.
$(VENV)-bench/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)-bench
	$(VENV)-bench/bin/python -m pip install --quiet --upgrade "pip>=25.1"
	$(VENV)-bench/bin/python -m pip install --quiet -c constraints.txt torch
	$(VENV)-bench/bin/python -m pip install --quiet -c constraints.txt -e . --group bench
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-audit $(VENV)-bench build dist .pytest_cache .mypy_cache .ruff_cache
