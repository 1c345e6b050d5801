/* A stand-in for NVIDIA pyxis on a test cluster: srun takes the same options, but there is no image.
 *
 * Mounts are really made, in a mount namespace of the task's own (needs a slurmd of root), and the working directory is really
 * entered. Everything else is only recorded: a task finds what was asked for in its environment, as PYXIS_STANDIN_IMAGE, _MOUNTS,
 * _WORKDIR, _ENV, _NAME, and in _FLAGS the options without a value. This tests command lines, mounts and directories, not images.
 *
 * gcc -shared -fPIC -O1 -Wall pyxis_standin.c -o pyxis_standin.so; then in plugstack.conf: required /path/pyxis_standin.so */
#define _GNU_SOURCE
#include <errno.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

#include <slurm/spank.h>

SPANK_PLUGIN(pyxis_standin, 1);

enum { IMAGE, MOUNTS, WORKDIR, ENV, NAME, VALUES };
static const char *variables[VALUES] = {"PYXIS_STANDIN_IMAGE", "PYXIS_STANDIN_MOUNTS", "PYXIS_STANDIN_WORKDIR",
                                        "PYXIS_STANDIN_ENV", "PYXIS_STANDIN_NAME"};
static char values[VALUES][8192];
static char flags[1024];
static unsigned given;

static int take(int option, const char *value, int remote);

static struct spank_option options[] = {
    {"container-image", "IMAGE", "stand-in: recorded", 1, IMAGE, take},
    {"container-mounts", "SRC:DST[:FLAGS][,...]", "stand-in: mounted", 1, MOUNTS, take},
    {"container-workdir", "PATH", "stand-in: entered", 1, WORKDIR, take},
    {"container-env", "NAME[,NAME...]", "stand-in: recorded", 1, ENV, take},
    {"container-name", "NAME", "stand-in: recorded", 1, NAME, take},
    {"container-mount-home", NULL, "stand-in: recorded", 0, VALUES + 0, take},
    {"no-container-mount-home", NULL, "stand-in: recorded", 0, VALUES + 1, take},
    {"container-remap-root", NULL, "stand-in: recorded", 0, VALUES + 2, take},
    {"no-container-remap-root", NULL, "stand-in: recorded", 0, VALUES + 3, take},
    {"container-entrypoint", NULL, "stand-in: recorded", 0, VALUES + 4, take},
    {"no-container-entrypoint", NULL, "stand-in: recorded", 0, VALUES + 5, take},
    {"container-writable", NULL, "stand-in: recorded", 0, VALUES + 6, take},
    {"container-readonly", NULL, "stand-in: recorded", 0, VALUES + 7, take},
    SPANK_OPTIONS_TABLE_END,
};

static int take(int option, const char *value, int remote) {
    (void)remote;
    if (option >= VALUES) {
        if (given & 1u << option) return ESPANK_SUCCESS; /* Slurm calls this twice in a task */
        given |= 1u << option;
        size_t used = strlen(flags);
        snprintf(flags + used, sizeof flags - used, "%s%s", used ? "," : "", options[option].name);
        return ESPANK_SUCCESS;
    }
    if (!value || strlen(value) >= sizeof values[option]) {
        slurm_error("pyxis_standin: --%s: no value, or too long", options[option].name);
        return ESPANK_BAD_ARG;
    }
    strcpy(values[option], value);
    return ESPANK_SUCCESS;
}

int slurm_spank_init(spank_t spank, int count, char **arguments) {
    (void)count;
    (void)arguments;
    spank_context_t context = spank_context();
    if (context != S_CTX_LOCAL && context != S_CTX_REMOTE) return ESPANK_SUCCESS; /* only srun and its tasks take the options */
    for (int i = 0; options[i].name; i++)
        if (spank_option_register(spank, &options[i]) != ESPANK_SUCCESS) {
            slurm_error("pyxis_standin: cannot register --%s", options[i].name);
            return ESPANK_ERROR;
        }
    return ESPANK_SUCCESS;
}

static int failed(const char *what, const char *path) {
    slurm_error("pyxis_standin: %s %s: %s", what, path, strerror(errno));
    return -1; /* while a task starts, Slurm takes only a negative value for a failure */
}

static void make_directories(char *path) {
    for (char *slash = path + 1; (slash = strchr(slash, '/')); slash++) {
        *slash = 0;
        mkdir(path, 0755);
        *slash = '/';
    }
    mkdir(path, 0755);
}

int slurm_spank_task_init_privileged(spank_t spank, int count, char **arguments) {
    (void)spank;
    (void)count;
    (void)arguments;
    static char list[sizeof values[MOUNTS]];
    if (!values[MOUNTS][0]) return ESPANK_SUCCESS;
    if (unshare(CLONE_NEWNS) || mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL)) return failed("mounts of its own for", "/");
    strcpy(list, values[MOUNTS]);
    char *rest = NULL;
    for (char *source = strtok_r(list, ",", &rest); source; source = strtok_r(NULL, ",", &rest)) {
        char *target = strchr(source, ':');
        if (target) *target++ = 0;
        else target = source;
        char *mode = strchr(target, ':');
        if (mode) *mode++ = 0;
        struct stat found;
        if (stat(source, &found)) return failed("mount of", source);
        if (strcmp(source, target)) {
            if (S_ISDIR(found.st_mode)) make_directories(target);
            if (mount(source, target, NULL, MS_BIND | MS_REC, NULL)) return failed("mount at", target);
        }
        if (mode && !strcmp(mode, "ro") && strcmp(source, target) &&
            mount(NULL, target, NULL, MS_BIND | MS_REMOUNT | MS_RDONLY, NULL))
            return failed("read-only mount at", target);
    }
    return ESPANK_SUCCESS;
}

int slurm_spank_task_init(spank_t spank, int count, char **arguments) {
    (void)count;
    (void)arguments;
    if (values[WORKDIR][0] && chdir(values[WORKDIR])) return failed("working directory", values[WORKDIR]);
    for (int i = 0; i < VALUES; i++)
        if (values[i][0]) spank_setenv(spank, variables[i], values[i], 1);
    if (flags[0]) spank_setenv(spank, "PYXIS_STANDIN_FLAGS", flags, 1);
    return ESPANK_SUCCESS;
}
