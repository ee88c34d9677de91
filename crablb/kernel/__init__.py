"""The package's ways into the kernel: BPF (:mod:`.bpf`), AF_XDP (:mod:`.xsk`) and netlink (:mod:`.netlink`)."""
