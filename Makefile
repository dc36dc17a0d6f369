# Every target starts from nothing: `setup` makes .venv and builds the kernels into the tree.
#   make demo    the main job on embedded models: train three small ones, run the daemon, merge, compare
#   make test    all tests            make lint    ruff, mypy, clang-format
#   make bench   the benchmark table  make setup   only the environment
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
NATIVE := setup.py pyproject.toml $(wildcard csrc/*.cpp csrc/*.h csrc/cpu/* csrc/cuda/*)
CPP := $(shell git ls-files "*.cpp" "*.h" "*.cu" "*.cuh")

# Waiting threads sleep: spinning ones starve the other processes of a test on few cores.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: setup demo test lint bench format install-service clean

setup: $(VENV)/.built

# torch comes first and on its own: the build must not fetch another one in isolation.
$(VENV)/.torch:
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) was not found; set PYTHON=/path/to/python3.11 or later" >&2; exit 1; }
	@command -v $${CXX:-c++} >/dev/null || { echo "make: no C++ compiler; install g++ (Debian: apt-get install g++)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/pip install --quiet --disable-pip-version-check "setuptools>=77" wheel "pybind11>=2.13" ninja
	touch $@

$(VENV)/.built: $(VENV)/.torch $(NATIVE)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --editable ".[test,lint]"
	touch $@

demo: setup
	$(BIN)/python -m benchmarks.demo $(ARGS)

test: setup
	$(BIN)/python -m pytest $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP)

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

bench: setup
	$(BIN)/python -m benchmarks $(ARGS)

# The unit, its user, and a configuration unless there is one, below DESTDIR; the program itself is
# installed with pip into /opt/mergecore.
install-service:
	install -D -m 644 service/deploy/mergecore.service "$(DESTDIR)/usr/lib/systemd/system/mergecore.service"
	install -D -m 644 service/deploy/sysusers.conf "$(DESTDIR)/usr/lib/sysusers.d/mergecore.conf"
	test -e "$(DESTDIR)/etc/mergecore/mergecore.toml" || \
		install -D -m 644 service/deploy/mergecore.toml "$(DESTDIR)/etc/mergecore/mergecore.toml"
	systemd-sysusers --root="$(DESTDIR)/" mergecore.conf

clean:
	rm -rf $(VENV) build *.egg-info mergecore/*.so
