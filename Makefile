# `make demo` and `make test` do all their set-up themselves, as root on a Debian 12 machine.

PYTHON ?= /usr/bin/python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := criserver shims snapshotter tests bench contrib setup.py
WORDS := docs proto Makefile pyproject.toml $(wildcard *.md)

export COVERAGE_FILE := $(CURDIR)/$(VENV)/coverage

RUN_PACKAGES := python3-venv runc containernetworking-plugins catatonit busybox-static iptables iproute2 procps
VM_PACKAGES := qemu-system-x86 mmdebstrap debian-archive-keyring e2fsprogs git
BENCH_PACKAGES := docker-registry e2fsprogs curl gzip zstd
TEST_PACKAGES := docker-registry skopeo umoci buildah openssl gcc libc6-dev criu golang-github-opencontainers-specs-dev microsocks

.PHONY: bench demo test test-vm lint unit integration e2e coverage faults soak format proto wheel deb release run-packages test-packages clean

demo: run-packages $(VENV)/ready
	$(BIN)/python contrib/demo.py

# Tests with a daemon wait more than they work. Workers share no port, bridge, address or directory.
WORKERS ?= 2
SHARED := --numprocesses $(WORKERS) --dist loadfile

# Coverage has a floor (pyproject.toml). Tests with a daemon are not measured here: some of them take time.
test: test-packages $(VENV)/ready lint
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest $(SHARED) tests/unit tests/integration
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report
	$(BIN)/pytest $(SHARED) tests --ignore tests/unit --ignore tests/integration

lint: $(VENV)/ready
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache --no-logo
	$(BIN)/codespell $(SOURCES) $(WORDS)

unit: $(VENV)/ready
	$(BIN)/pytest $(SHARED) tests/unit

integration: test-packages $(VENV)/ready
	$(BIN)/pytest $(SHARED) tests/integration

e2e: test-packages $(VENV)/ready
	$(BIN)/pytest $(SHARED) tests/e2e tests/field tests/security tests/conformance

# Of all tests, those with a daemon too.
coverage: test-packages $(VENV)/ready
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest tests
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report --fail-under 86

# Every operation with a fault at every side effect: docs/reliability.md. OPERATIONS can name some: "StopContainer Image".
faults: test-packages $(VENV)/ready
	$(BIN)/python -m tests.faults $(OPERATIONS)

# Pods live and die beside kills of the daemon and other faults: docs/reliability.md. PLOT can name an SVG file.
MINUTES ?= 30
soak: test-packages $(VENV)/ready
	$(BIN)/python -m tests.faults.soak $(MINUTES) $(if $(PLOT),--plot $(PLOT))

# Beside the containerd on PATH, or Debian's. It writes the figures into the pages, and all samples into dist/bench.json.
# BENCH can have other options than the default: bench/README.md.
BENCH ?= --pages --json dist/bench.json
bench: run-packages $(VENV)/ready $(VENV)/daemon/ready
	@contrib/need.sh $(BENCH_PACKAGES)
	@contrib/unpack-containerd.sh $(VENV)/containerd
	@mkdir -p dist
	PATH="$$PATH:$(CURDIR)/$(VENV)/containerd/usr/bin" BENCH_PYTHON="$(CURDIR)/$(VENV)/daemon/bin/python" \
		$(BIN)/python -m bench $(BENCH)

format: $(VENV)/ready
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

proto: $(VENV)/ready
	$(BIN)/python -c "import setup; setup.generate()"

wheel: $(VENV)/ready
	rm -rf build
	$(BIN)/pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir dist .

# The Python that the package is for, and the build of this version. A higher revision is an upgrade.
DEB_PYTHON ?= 3.11
DEB_REVISION ?= 1

deb: $(VENV)/ready
	$(BIN)/python contrib/deb/build.py --python $(DEB_PYTHON) --revision $(DEB_REVISION)

# One of the steps of RELEASE.md.
release: $(VENV)/ready
	$(BIN)/python contrib/release.py "$(VERSION)"

# A node with systemd in a virtual machine: docs/virtual-machine.md. SUITES can name some suites.
test-vm: $(VENV)/ready
	@contrib/need.sh $(VM_PACKAGES)
	$(BIN)/python -m tests.vm test $(SUITES)

run-packages:
	@contrib/need.sh $(RUN_PACKAGES)

test-packages: run-packages
	@contrib/need.sh $(TEST_PACKAGES)
	@contrib/newer-criu.sh $(VENV)/criu

$(VENV)/ready: requirements-dev.lock pyproject.toml setup.py criserver/__init__.py $(shell find proto -name '*.proto')
	@contrib/need.sh python3-venv
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r requirements-dev.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
	touch $@

# What a node's package has, for the daemon of the benchmark. Some libraries load tools of development where they find them.
$(VENV)/daemon/ready: requirements.lock $(VENV)/ready
	rm -rf $(VENV)/daemon
	$(PYTHON) -m venv $(VENV)/daemon
	$(VENV)/daemon/bin/pip install --quiet --disable-pip-version-check --require-hashes --requirement requirements.lock
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info criserver/pb
