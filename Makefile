# Two commands do everything on a fresh machine:
#   make demo    real connections through the load balancer, in a network of namespaces
#   make test    every test but the long ones
# And
#   make demo-often    the demo again and again, up to its first failure (TIMES=30)
#   make man     manual pages, into build/man
#   make docs    the documentation site, into build/docs/html (ARGS=linkcheck: whether what it links to elsewhere is there)
#   make sdist, make wheel, make deb     what crablb is installed from, into build/ (docs/packages.md)
#   make bench   what the load balancer costs here, beside what else people use (ARGS=--quick: in some five minutes)
#   make test-long     what takes minutes: no byte twice, nobody worse off, load balancers of others
#   make test-disturbed     `make test` on a machine that stands still now and then (ARGS='tests/lab -k takeover')
#   make test-each     every combination and every call, of which the two above try some: an hour or two
#   make test-stacks   other people's programs through the load balancer: nginx, OpenSSH, PostgreSQL, ...
#   make test-foreign   other people's own test suites, by redirection, fallback and MPTCP, beside the same without a load balancer
#   make test-distros   those two on fresh Debian systems (DISTROS='bookworm trixie sid' COMMANDS='demo test')
#   make test-install   docs/install.md in empty roots (DISTROS='bookworm trixie' ARGS='--ways apt'), of build/deb and build/wheel
#   make test-container   docs/containers.md by Podman, of build/deb
#   make test-kernels   every BPF program, the demo, and what else goes by the kernel, in Debian's (KERNELS='6.1 6.12 newest', ARGS='--step cards'), by qemu
#   make test-pythons   one wheel, from the source archive alone, with every Python here (PYTHONS='3.11 3.12 3.13 3.14')
#   make test-packages   made on fresh Debian systems, installed, upgraded, removed and purged on others (DISTROS='bookworm trixie')
#   make test-units    the systemd units on fresh Debian systems, booted in containers (DISTROS='bookworm trixie')
#   make fuzz    libFuzzer over native/, from the corpora in tests/fuzz (ARGS='--seconds 600 --jobs 2', ARGS=--coverage)
#   make sim    a farm in one process, seed by seed: a million connections, and what befalls them (ARGS='--seed 7 --each 2000')
#   make deaths    load balancer, agents, path manager killed 200 times under 500 connections (ARGS='--rounds 20', ARGS=--calls)
#   make soak    an hour of use: what grows, and what breaks though nothing was killed (ARGS='--minutes 5 --seed 7')
#   make test-compilers   the BPF programs by every clang here and of the package index, through the verifier (CLANGS='14 19')
# Each first installs what it needs (system packages by apt, Python packages into .venv), once.

SHELL := /bin/sh
PYTHON ?= python3
VENV := .venv
STAMPS := .stamps
# Namespaces, BPF and AF_XDP belong to root.
SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo)
ARGS ?=
TIMES ?= 30
# Processes that run tests: so many that some wait and some work.
WORKERS ?= $(shell echo $$(($$(nproc) + 2)))
# Of test-distros, test-units and test-kernels, which get ARGS, MIRROR, ACCEL and proxies by the environment; none: all.
DISTROS ?=
COMMANDS ?= demo test
KERNELS ?=
PYTHONS ?=
CLANGS ?=

PACKAGES := clang llvm gcc libc6-dev linux-libc-dev libbpf-dev libelf-dev make pkg-config python3-dev python3-venv \
            iproute2 ethtool procps nftables nginx-light curl iperf3 tcpdump keepalived
# What tests look at metrics, the status page, manual pages, captures and units with; what docs/migration.md is run with.
TEST_PACKAGES := iputils-ping chromium fonts-dejavu-core groff-base prometheus systemd tshark haproxy ipvsadm kmod openssl
# What the benchmarks measure beside crablb, and with.
BENCH_PACKAGES := haproxy libnginx-mod-stream mptcpize wrk valgrind
# What Debian's packages are made and looked at with.
DEB_PACKAGES := build-essential debhelper dpkg-dev lintian python3-pip
# Whose connections tests/stacks makes; two more are fetched with their sources.
STACK_PACKAGES := debian-archive-keyring mptcpize openssh-client openssh-server openssl tcl
# Whose own test suites tests/foreign runs; some are fetched with their sources.
FOREIGN_PACKAGES := apache2-bin haproxy litmus nghttp2-client testssl.sh xz-utils
# What other machines are made with (tests/machines).
DISTRO_PACKAGES := debootstrap debian-archive-keyring git
CONTAINER_PACKAGES := podman runc
UNIT_PACKAGES := debootstrap debian-archive-keyring git systemd-container
# Clang's own libraries: sanitizers, libFuzzer, counters.
FUZZ_PACKAGES = libclang-rt-$$(clang -dumpversion | cut -d. -f1)-dev
KERNEL_PACKAGES := qemu-system-x86 debian-archive-keyring cpio kmod xz-utils zstd

# Tests of a group (pytest.mark.xdist_group) share something dear, or what the machine has one of: one process runs them.
PARALLEL = -n $(WORKERS) --dist loadgroup

SOURCES := setup.py pyproject.toml native/libbpf.cdef $(wildcard native/*.[ch] native/*.py bpf/*.[ch])

# Tests start thousands of Python processes: each would compile crablb's modules anew where none may be written
# (PYTHONDONTWRITEBYTECODE).  As whoever runs them: folders of modules that root has run are root's.
COMPILED = @$(SUDO) $(VENV)/bin/python -m compileall -q crablb tests bench

.PHONY: demo demo-often test test-long test-disturbed test-each bench man docs sdist wheel deb test-stacks test-foreign test-distros test-install test-container test-kernels test-pythons test-units test-packages test-compilers fuzz sim soak deaths lint c-test clean help
help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile

demo: $(STAMPS)/built
	@$(SUDO) $(VENV)/bin/crablb demo $(ARGS)

demo-often: $(STAMPS)/built
	@n=0; while [ $$n -lt $(TIMES) ]; do n=$$((n + 1)); echo "==> demo $$n of $(TIMES)"; \
	  $(SUDO) $(VENV)/bin/crablb demo $(ARGS) || { s=$$?; echo "crablb: demo $$n of $(TIMES) failed" >&2; exit $$s; }; \
	done

test: $(STAMPS)/tested-tools c-test lint
	$(COMPILED)
	$(SUDO) $(VENV)/bin/python -m pytest $(PARALLEL) --durations=10 $(ARGS)

test-long: $(STAMPS)/tested-tools
	$(COMPILED)
	$(SUDO) $(VENV)/bin/python -m pytest $(PARALLEL) -m 'long and not each' --durations=10 $(ARGS)

test-disturbed: $(STAMPS)/tested-tools
	$(COMPILED)
	$(SUDO) $(VENV)/bin/python tests/machines/disturbed.py -- $(VENV)/bin/python -m pytest $(PARALLEL) --durations=10 $(ARGS)

test-each: $(STAMPS)/tested-tools
	$(COMPILED)
	$(SUDO) $(VENV)/bin/python -m pytest $(PARALLEL) -m each --timeout=3000 --durations=10 $(ARGS)

bench: $(STAMPS)/bench-tools
	@$(SUDO) $(VENV)/bin/crablb bench $(ARGS)

man: $(STAMPS)/man-tools
	@$(VENV)/bin/python docs/manpages.py build/man

# Warnings are errors; all is made anew, as pages are made of the program too.
docs: $(STAMPS)/docs-tools
	@$(VENV)/bin/python -m sphinx -E -W --keep-going -q -d build/docs/doctrees -b $(or $(ARGS),html) docs build/docs/$(or $(ARGS),html)
	@echo "==> build/docs/$(or $(ARGS),html)"

sdist: $(STAMPS)/package-tools
	@$(VENV)/bin/python deploy/package.py $@

wheel: $(STAMPS)/package-tools
	@$(VENV)/bin/python deploy/package.py $@

deb: $(STAMPS)/package-tools $(STAMPS)/deb-packages
	@$(VENV)/bin/python deploy/package.py $@

test-stacks: $(STAMPS)/tested-tools $(STAMPS)/stacks
	$(SUDO) $(VENV)/bin/python -m pytest tests/stacks --durations=10 -o tmp_path_retention_policy=failed $(ARGS)

test-foreign: $(STAMPS)/tested-tools $(STAMPS)/foreign
	$(SUDO) $(VENV)/bin/python -m pytest tests/foreign -n $(WORKERS) --dist loadfile --no-loadscope-reorder --timeout=3600 --durations=10 -o tmp_path_retention_policy=failed $(ARGS)

test-distros: $(STAMPS)/distro-packages $(VENV)/bin/python
	@$(SUDO:sudo=sudo -E) $(VENV)/bin/python tests/machines/distros.py --commands='$(COMMANDS)' $(DISTROS)

test-install: $(STAMPS)/tested-tools $(STAMPS)/distro-packages
	@$(SUDO:sudo=sudo -E) $(VENV)/bin/python tests/machines/install.py $(ARGS) $(DISTROS)

test-container: $(STAMPS)/tested-tools $(STAMPS)/distro-packages $(STAMPS)/container-tools
	@$(SUDO:sudo=sudo -E) $(VENV)/bin/python tests/machines/container.py
test-units: $(STAMPS)/tested-tools $(STAMPS)/unit-packages
	@$(SUDO:sudo=sudo -E) $(VENV)/bin/python tests/machines/units.py $(DISTROS)

test-kernels: $(STAMPS)/tested-tools $(STAMPS)/kernel-packages
	@$(SUDO:sudo=sudo -E) $(VENV)/bin/python tests/machines/kernels.py $(ARGS) $(KERNELS)

test-pythons: $(STAMPS)/tested-tools
	@$(SUDO:sudo=sudo -E) $(VENV)/bin/python tests/machines/pythons.py $(PYTHONS)

test-packages: $(STAMPS)/distro-packages $(VENV)/bin/python
	@$(SUDO:sudo=sudo -E) $(VENV)/bin/python tests/machines/packages.py $(ARGS) $(DISTROS)

test-compilers: $(STAMPS)/tested-tools $(STAMPS)/compiler-packages
	@$(SUDO:sudo=sudo -E) $(VENV)/bin/python tests/machines/compilers.py $(ARGS) $(CLANGS)

fuzz: $(STAMPS)/tested-tools $(STAMPS)/fuzz-packages
	@$(SUDO:sudo=sudo -E) $(VENV)/bin/python -m tests.fuzz $(ARGS)

sim: $(STAMPS)/packages $(VENV)/bin/python
	@$(VENV)/bin/python -m tests.sim $(ARGS)

deaths: $(STAMPS)/tested-tools
	@$(SUDO:sudo=sudo -E) $(VENV)/bin/python -m tests.deaths $(ARGS)

soak: $(STAMPS)/tested-tools
	@$(SUDO) $(VENV)/bin/python -m tests.soak $(ARGS)

# The hot loop by itself, with the sanitizers on.
c-test: $(STAMPS)/packages
	$(MAKE) -C native test

lint: $(STAMPS)/tested-tools
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# Installs what is missing of the system packages $(1).
define install
@mkdir -p $(STAMPS)
@if ! command -v apt-get >/dev/null; then \
  echo "crablb: this is not a Debian-like system. Install what these packages hold, then touch $@:" >&2; \
  echo "  $(1)" >&2; exit 1; fi
@missing=; for p in $(1); do \
  dpkg-query -W -f '$${Status}' $$p 2>/dev/null | grep -q 'ok installed' || missing="$$missing $$p"; done; \
if [ -n "$$missing" ]; then \
  echo "==> installing system packages:$$missing"; \
  $(SUDO) apt-get update -qq && \
  $(SUDO) env DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get install -y -qq --no-install-recommends $$missing >/dev/null; fi
@touch $@
endef

$(STAMPS)/packages: Makefile
	$(call install,$(PACKAGES))

$(STAMPS)/bench-packages: Makefile
	$(call install,$(BENCH_PACKAGES))

$(STAMPS)/test-packages: Makefile
	$(call install,$(TEST_PACKAGES))

$(STAMPS)/deb-packages: Makefile
	$(call install,$(DEB_PACKAGES))

$(STAMPS)/stack-packages: Makefile
	$(call install,$(STACK_PACKAGES))

$(STAMPS)/stacks: tests/stacks/fetch.py $(STAMPS)/stack-packages $(VENV)/bin/python
	@echo "==> fetching programs with their test suites into .stacks"
	@$(SUDO) $(VENV)/bin/python tests/stacks/fetch.py .stacks
	@touch $@

$(STAMPS)/foreign-packages: Makefile
	$(call install,$(FOREIGN_PACKAGES))

# After tests/stacks, which makes .stacks anew.
$(STAMPS)/foreign: tests/foreign/fetch.py $(STAMPS)/stacks $(STAMPS)/foreign-packages
	@echo "==> fetching test suites into .stacks/foreign"
	@$(SUDO) $(VENV)/bin/python -m tests.foreign.fetch .stacks/foreign
	@touch $@

$(STAMPS)/distro-packages: Makefile
	$(call install,$(DISTRO_PACKAGES))

$(STAMPS)/container-packages: Makefile
	$(call install,$(CONTAINER_PACKAGES))

$(STAMPS)/container-tools: $(STAMPS)/container-packages $(VENV)/bin/python
	@echo "==> installing podman-compose into $(VENV)"
	@$(VENV)/bin/pip install -q --disable-pip-version-check 'podman-compose>=1.2'
	@touch $@
$(STAMPS)/unit-packages: Makefile
	$(call install,$(UNIT_PACKAGES))

# All clangs that apt knows from 14 on.
$(STAMPS)/compiler-packages: Makefile
	$(call install,$$(apt-cache search --names-only '^clang-[0-9]+$$' | sed -n 's/^\(clang-\(1[4-9]\|[2-9][0-9]\)\) .*/\1/p'))

$(STAMPS)/fuzz-packages: Makefile $(STAMPS)/packages
	$(call install,$(FUZZ_PACKAGES))

$(STAMPS)/kernel-packages: Makefile
	$(call install,$(KERNEL_PACKAGES))

$(VENV)/bin/python: | $(STAMPS)/packages
	@echo "==> making the virtual environment $(VENV)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "crablb: Python 3.11 or newer is needed; say which: make PYTHON=python3.x ..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV)

$(STAMPS)/built: $(SOURCES) $(STAMPS)/packages $(VENV)/bin/python
	@echo "==> compiling and installing crablb into $(VENV)"
	@$(VENV)/bin/pip install -q --disable-pip-version-check -e .
	@touch $@

$(STAMPS)/bench-tools: $(STAMPS)/built $(STAMPS)/bench-packages
	@echo "==> installing the benchmarks' tools into $(VENV)"
	@$(VENV)/bin/pip install -q --disable-pip-version-check -e '.[bench]'
	@touch $@

$(STAMPS)/man-tools: $(STAMPS)/built
	@echo "==> installing what makes manual pages into $(VENV)"
	@$(VENV)/bin/pip install -q --disable-pip-version-check -e '.[man]'
	@touch $@

$(STAMPS)/docs-tools: $(STAMPS)/built
	@echo "==> installing what makes the documentation site into $(VENV)"
	@$(VENV)/bin/pip install -q --disable-pip-version-check -e '.[docs]'
	@touch $@

$(STAMPS)/package-tools: $(STAMPS)/built
	@echo "==> installing what makes packages into $(VENV)"
	@$(VENV)/bin/pip install -q --disable-pip-version-check -e '.[package]'
	@touch $@

$(STAMPS)/tested-tools: $(STAMPS)/bench-tools $(STAMPS)/test-packages
	@echo "==> installing the test tools into $(VENV)"
	@$(VENV)/bin/pip install -q --disable-pip-version-check -e '.[test]'
	@touch $@

clean:
	rm -rf $(VENV) $(STAMPS) build dist *.egg-info crablb/kernel/objects native/build bench/build
	find crablb -name '*.so' -delete
	[ ! -d .machines ] && [ ! -d .stacks ] || $(SUDO) rm -rf .machines .stacks
