/* SPDX-License-Identifier: MIT */
/* What the package uses of libbpf (1.0 and newer) and of linux/bpf.h, for cffi; the C compiler checks each declaration
 * against the installed headers. */

struct bpf_object;
struct bpf_program;
struct bpf_map;

struct bpf_object_open_opts {
    size_t sz;
    const char *object_name;
    ...;
};
struct bpf_link_create_opts {
    size_t sz;
    uint32_t flags;
    ...;
};
struct bpf_link_update_opts {
    size_t sz;
    uint32_t flags;
    ...;
};
struct bpf_test_run_opts {
    size_t sz;
    const void *data_in;
    void *data_out;
    uint32_t data_size_in;
    uint32_t data_size_out;
    const void *ctx_in;
    void *ctx_out;
    uint32_t ctx_size_in;
    uint32_t ctx_size_out;
    uint32_t retval;
    int repeat;
    uint32_t duration;
    uint32_t flags;
    ...;
};
struct bpf_tc_hook {
    size_t sz;
    int ifindex;
    int attach_point;
    uint32_t parent;
    ...;
};
struct bpf_tc_opts {
    size_t sz;
    int prog_fd;
    uint32_t flags;
    uint32_t prog_id;
    uint32_t handle;
    uint32_t priority;
    ...;
};
struct bpf_xdp_query_opts {
    size_t sz;
    uint32_t prog_id;
    uint32_t drv_prog_id;
    uint32_t hw_prog_id;
    uint32_t skb_prog_id;
    uint8_t attach_mode;
    ...;
};
struct bpf_map_info {
    uint32_t type;
    uint32_t id;
    uint32_t key_size;
    uint32_t value_size;
    uint32_t max_entries;
    uint32_t map_flags;
    char name[16];
    ...;
};
struct bpf_prog_info {
    uint32_t type;
    uint32_t id;
    char name[16];
    uint64_t run_time_ns;
    uint64_t run_cnt;
    uint32_t verified_insns;
    ...;
};
struct bpf_link_info {
    uint32_t type;
    uint32_t id;
    uint32_t prog_id;
    ...;
};

struct bpf_object *bpf_object__open_file(const char *path, const struct bpf_object_open_opts *opts);
int bpf_object__load(struct bpf_object *obj);
void bpf_object__close(struct bpf_object *obj);
struct bpf_program *bpf_object__next_program(const struct bpf_object *obj, struct bpf_program *prog);
struct bpf_map *bpf_object__next_map(const struct bpf_object *obj, const struct bpf_map *map);
const char *bpf_program__name(const struct bpf_program *prog);
int bpf_program__set_flags(struct bpf_program *prog, uint32_t flags);
int bpf_program__fd(const struct bpf_program *prog);
int bpf_program__type(const struct bpf_program *prog);
const char *bpf_map__name(const struct bpf_map *map);
int bpf_map__fd(const struct bpf_map *map);
uint32_t bpf_map__key_size(const struct bpf_map *map);
uint32_t bpf_map__value_size(const struct bpf_map *map);
int bpf_map__set_max_entries(struct bpf_map *map, uint32_t max_entries);
int bpf_map__reuse_fd(struct bpf_map *map, int fd);
int bpf_map__set_initial_value(struct bpf_map *map, const void *data, size_t size);
const void *bpf_map__initial_value(struct bpf_map *map, size_t *psize);
bool bpf_map__is_internal(const struct bpf_map *map);

int bpf_map_lookup_elem(int fd, const void *key, void *value);
int bpf_map_update_elem(int fd, const void *key, const void *value, uint64_t flags);
int bpf_map_delete_elem(int fd, const void *key);
struct bpf_map_batch_opts;
int bpf_map_lookup_batch(int fd, void *in_batch, void *out_batch, void *keys, void *values, __u32 *count,
                         const struct bpf_map_batch_opts *opts);
int bpf_map_get_next_key(int fd, const void *key, void *next_key);
int bpf_obj_pin(int fd, const char *path);
int bpf_obj_get(const char *path);
int bpf_prog_get_next_id(uint32_t start_id, uint32_t *next_id);
int bpf_prog_get_fd_by_id(uint32_t id);
int bpf_obj_get_info_by_fd(int fd, void *info, uint32_t *info_len);
int bpf_prog_query(int target_fd, enum bpf_attach_type type, uint32_t query_flags, uint32_t *attach_flags,
                   uint32_t *prog_ids, uint32_t *prog_cnt);
int bpf_link_create(int prog_fd, int target_fd, int attach_type, const struct bpf_link_create_opts *opts);
int bpf_link_update(int link_fd, int new_prog_fd, const struct bpf_link_update_opts *opts);
int bpf_link_detach(int link_fd);
int bpf_iter_create(int link_fd);
int bpf_prog_test_run_opts(int prog_fd, struct bpf_test_run_opts *opts);
int bpf_tc_hook_create(struct bpf_tc_hook *hook);
int bpf_tc_hook_destroy(struct bpf_tc_hook *hook);
int bpf_tc_attach(const struct bpf_tc_hook *hook, struct bpf_tc_opts *opts);
int bpf_tc_detach(const struct bpf_tc_hook *hook, const struct bpf_tc_opts *opts);
int bpf_tc_query(const struct bpf_tc_hook *hook, struct bpf_tc_opts *opts);
int bpf_xdp_query(int ifindex, int flags, struct bpf_xdp_query_opts *opts);
int libbpf_num_possible_cpus(void);

struct ring_buffer;
struct ring_buffer_opts;
struct ring_buffer *ring_buffer__new(int map_fd, int (*sample)(void *context, void *data, size_t size), void *context,
                                     const struct ring_buffer_opts *opts);
void ring_buffer__free(struct ring_buffer *ring);
int ring_buffer__consume(struct ring_buffer *ring);
int ring_buffer__epoll_fd(const struct ring_buffer *ring);

#define BPF_TC_INGRESS ...
#define BPF_TC_EGRESS ...
#define BPF_TC_F_REPLACE ...
#define BPF_XDP ...
#define XDP_ATTACHED_SKB ...
#define BPF_CGROUP_SOCK_OPS ...
#define BPF_CGROUP_INET_INGRESS ...
#define BPF_F_ALLOW_MULTI ...
#define BPF_TRACE_ITER ...
#define BPF_MAP_TYPE_PERCPU_HASH ...
#define BPF_MAP_TYPE_PERCPU_ARRAY ...
#define BPF_MAP_TYPE_LRU_PERCPU_HASH ...
#define BPF_F_MMAPABLE ...
#define BPF_F_XDP_HAS_FRAGS ...

/* Of the extension itself (native/cffi_build.py): libbpf's messages since the last call, of this thread. */
void crab_log_install(void);
const char *crab_log_take(void);
