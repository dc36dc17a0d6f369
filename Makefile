# Every target starts from nothing: `setup` makes .venv and builds the kernels into the tree.
#   make demo    the main job on embedded models: train three small ones, run the daemon, merge, compare
#   make test    all tests            make lint    ruff, mypy, clang-format
#   make bench   the benchmark table  make setup   only the environment
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
NATIVE := setup.py pyproject.toml $(wildcard csrc/*.cpp csrc/*.h csrc/cpu/* csrc/cuda/* csrc/stream/*)
CPP := $(shell git ls-files "*.cpp" "*.h" "*.cu" "*.cuh")

# Waiting threads sleep: spinning ones starve the other processes of a test on few cores.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: setup demo test lint bench format install-service uninstall-service clean

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

# Below DESTDIR: the unit, its user and folders, a configuration unless there is one, and what Prometheus and Grafana
# take. The program itself is installed with pip into /opt/mergecore.
UNIT := $(DESTDIR)/usr/lib/systemd/system/mergecore.service
SYSUSERS := $(DESTDIR)/usr/lib/sysusers.d/mergecore.conf
TMPFILES := $(DESTDIR)/usr/lib/tmpfiles.d/mergecore.conf
SHARE := $(DESTDIR)/usr/share/mergecore

install-service:
	install -D -m 644 service/deploy/mergecore.service "$(UNIT)"
	install -D -m 644 service/deploy/sysusers.conf "$(SYSUSERS)"
	install -D -m 644 service/deploy/tmpfiles.conf "$(TMPFILES)"
	install -D -m 644 -t "$(SHARE)" service/deploy/rules.yml service/deploy/dashboard.json
	test -e "$(DESTDIR)/etc/mergecore/mergecore.toml" || \
		install -D -m 644 service/deploy/mergecore.toml "$(DESTDIR)/etc/mergecore/mergecore.toml"
	systemd-sysusers --root="$(DESTDIR)/" mergecore.conf
	test "$$(id -u)" != 0 || systemd-tmpfiles --root="$(DESTDIR)/" --create mergecore.conf

# What install-service put there. The configuration, the user, and everything below /var/lib/mergecore stay.
uninstall-service:
	test -n "$(DESTDIR)" || test ! -e "$(UNIT)" || systemctl disable --now mergecore.service
	rm -f "$(UNIT)" "$(SYSUSERS)" "$(TMPFILES)" "$(SHARE)/rules.yml" "$(SHARE)/dashboard.json"
	test ! -d "$(SHARE)" || rmdir --ignore-fail-on-non-empty "$(SHARE)"

clean:
	rm -rf $(VENV) build *.egg-info mergecore/*.so
