/* The programs of the conformance tests, for sandboxes that run Wasm and not this machine's programs.
 *
 * One WASI (preview 1) module for all of them: what it does is the last part of its name without ".wasm", as for busybox,
 * or its first argument when it is called "tool". `do A x ; B y` does several in a row, up to the first that fails.
 * Written for tests: it says what it finds, checks what it says, and stops at the first thing that is not as expected.
 *
 * Built by tools/build_guest.py with Debian's clang and wasi-libc. Output is written at once, without a buffer of its own
 * beyond one call, so that nothing is lost with a trap. 64 (EX_USAGE of sysexits.h): a test has used it wrongly.
 */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#include <wasi/api.h>

enum { BLOCK = 65536, MIB = 1 << 20, LINE = 4096 };

typedef int command(int argc, char **argv);

/* --- output --- */

/* An errno of write is the end of the program: there is nobody to tell. 74 is EX_IOERR of sysexits.h. */
static void put(int fd, const void *data, size_t size) {
    const char *at = data;
    while (size > 0) {
        ssize_t done = write(fd, at, size);
        if (done < 0)
            _exit(74);
        at += done;
        size -= (size_t)done;
    }
}

static void say(int fd, const char *text) { put(fd, text, strlen(text)); }

static void say_number(int fd, uint64_t number) {
    char digits[24], *at = digits + sizeof digits;
    do
        *--at = (char)('0' + number % 10);
    while (number /= 10);
    put(fd, at, (size_t)(digits + sizeof digits - at));
}

/* What the field calls the errors that tests look for; WASI's numbers are not Linux's. */
static const char *error_name(int error) {
    switch (error) {
    case ENOSPC: return "ENOSPC";
    case EDQUOT: return "EDQUOT";
    case EACCES: return "EACCES";
    case EPERM: return "EPERM";
    case EROFS: return "EROFS";
    case ENOENT: return "ENOENT";
    case EEXIST: return "EEXIST";
    case ENOTDIR: return "ENOTDIR";
    case EISDIR: return "EISDIR";
    case ENOTEMPTY: return "ENOTEMPTY";
    case ENOTSUP: return "ENOTSUP";
    case EBADF: return "EBADF";
    case EINVAL: return "EINVAL";
    case EMFILE: return "EMFILE";
    case ENFILE: return "ENFILE";
    case ENXIO: return "ENXIO";
    case ELOOP: return "ELOOP";
    case EXDEV: return "EXDEV";
    case EIO: return "EIO";
    case ENOTCAPABLE: return "ENOTCAPABLE";
    default: return strerror(error);
    }
}

/* Says what failed, as programs do: "tool: PATH: No space left on device (ENOSPC)". Returns the exit code 1. */
static int failed(const char *what) {
    int error = errno;
    say(2, "tool: "), say(2, what), say(2, ": "), say(2, strerror(error));
    say(2, " ("), say(2, error_name(error)), say(2, ")\n");
    return 1;
}

/* --- words --- */

static uint64_t number(const char *word) { return strtoull(word, NULL, 10); }

/* "1.25" as nanoseconds; strtod would be half of this module. */
static uint64_t nanoseconds(const char *word) {
    char *rest;
    uint64_t all = strtoull(word, &rest, 10) * 1000000000, unit = 100000000;
    if (*rest == '.')
        for (rest++; *rest >= '0' && *rest <= '9'; rest++, unit /= 10)
            all += (uint64_t)(*rest - '0') * unit;
    return all;
}

/* Replaces \ooo (octal) and \\ in place, so that a word can hold any byte but NUL. Returns its new size. */
static size_t unescape(char *word) {
    char *to = word;
    for (char *from = word; *from;) {
        if (from[0] != '\\' || !from[1]) {
            *to++ = *from++;
        } else if (from[1] == '\\') {
            *to++ = '\\', from += 2;
        } else {
            int byte = 0, digits = 0;
            for (from++; digits < 3 && *from >= '0' && *from <= '7'; digits++)
                byte = byte * 8 + *from++ - '0';
            if (!digits)
                _exit(64);
            *to++ = (char)byte;
        }
    }
    *to = 0;
    return (size_t)(to - word);
}

static int is(const char *word, const char *other) { return strcmp(word, other) == 0; }

/* --- ends --- */

static int do_true(int argc, char **argv) { return (void)argc, (void)argv, 0; }

static int do_exit(int argc, char **argv) {
    if (argc != 2)
        return 64;
    _exit((int)number(argv[1]));
}

static int do_abort(int argc, char **argv) {
    (void)argc, (void)argv;
    abort();
}

static int do_divide(int argc, char **argv) {
    (void)argv;
    volatile int zero = argc - 1;
    return argc / zero;
}

/* --- streams --- */

static int do_out(int argc, char **argv) {
    for (int n = 1; n < argc; n++)
        put(1, argv[n], unescape(argv[n]));
    return 0;
}

static int do_err(int argc, char **argv) {
    for (int n = 1; n < argc; n++)
        put(2, argv[n], unescape(argv[n]));
    return 0;
}

static int do_echo(int argc, char **argv) {
    for (int n = 1; n < argc; n++)
        say(1, argv[n]), say(1, n + 1 < argc ? " " : "");
    say(1, "\n");
    return 0;
}

static char block[BLOCK];

static int copy(int from, const char *name) {
    ssize_t got;
    while ((got = read(from, block, sizeof block)) > 0)
        put(1, block, (size_t)got);
    return got < 0 ? failed(name) : 0;
}

static int do_cat(int argc, char **argv) {
    if (argc == 1)
        return copy(0, "standard input");
    for (int n = 1; n < argc; n++) {
        int fd = open(argv[n], O_RDONLY);
        if (fd < 0)
            return failed(argv[n]);
        int code = copy(fd, argv[n]);
        close(fd);
        if (code)
            return code;
    }
    return 0;
}

/* `write N [err]`: N blocks of 64 KiB, the bytes 0 to 255 over and over. */
static int do_write(int argc, char **argv) {
    if (argc < 2)
        return 64;
    for (int n = 0; n < BLOCK; n++)
        block[n] = (char)n;
    for (uint64_t n = number(argv[1]); n > 0; n--)
        put(argc > 2 && is(argv[2], "err") ? 2 : 1, block, sizeof block);
    return 0;
}

/* `flood [err]`: lines without end. */
static int do_flood(int argc, char **argv) {
    for (int n = 0; n < 1024; n += 2)
        memcpy(block + n, "x\n", 2);
    for (;;)
        put(argc > 1 && is(argv[1], "err") ? 2 : 1, block, 1024);
}

/* `count N`: the numbers below N, a line each, and then a line for the errors. */
static int do_count(int argc, char **argv) {
    if (argc != 2)
        return 64;
    size_t used = 0;
    uint64_t end = number(argv[1]);
    for (uint64_t n = 0; n < end; n++) {
        char digits[24], *at = digits + sizeof digits;
        *--at = '\n';
        uint64_t rest = n;
        do
            *--at = (char)('0' + rest % 10);
        while (rest /= 10);
        size_t size = (size_t)(digits + sizeof digits - at);
        if (used + size > sizeof block)
            put(1, block, used), used = 0;
        memcpy(block + used, at, size), used += size;
    }
    put(1, block, used);
    say(2, "error\n");
    return 0;
}

/* `read [BEFORE]`: reads a line of the input, byte by byte so that nothing of the next is taken; with BEFORE it writes
 * BEFORE and the line. No line, only an end: 1, but `await [BEFORE]` tries again until there is one. */
static int do_read(int argc, char **argv) {
    char line[LINE];
    size_t size = 0;
    while (size < sizeof line) {
        ssize_t got = read(0, line + size, 1);
        if (got < 0)
            return failed("standard input");
        if (got == 0 && !is(argv[0], "await"))
            return 1;
        if (got == 0)
            nanosleep(&(struct timespec){.tv_nsec = 10000000}, NULL);
        else if (line[size++] == '\n')
            break;
    }
    if (argc > 1)
        say(1, argv[1]), put(1, line, size);
    return 0;
}

/* --- SHA-256 of the input (FIPS 180-4) --- */

static const uint32_t round_constants[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
};

static uint32_t rotate(uint32_t value, int by) { return value >> by | value << (32 - by); }

static void digest_chunk(uint32_t state[8], const unsigned char *data) {
    uint32_t w[64], v[8];
    for (int n = 0; n < 16; n++)
        w[n] = (uint32_t)data[4 * n] << 24 | (uint32_t)data[4 * n + 1] << 16 | (uint32_t)data[4 * n + 2] << 8 |
               data[4 * n + 3];
    for (int n = 16; n < 64; n++) {
        uint32_t low = rotate(w[n - 15], 7) ^ rotate(w[n - 15], 18) ^ w[n - 15] >> 3;
        uint32_t high = rotate(w[n - 2], 17) ^ rotate(w[n - 2], 19) ^ w[n - 2] >> 10;
        w[n] = w[n - 16] + low + w[n - 7] + high;
    }
    memcpy(v, state, sizeof v);
    for (int n = 0; n < 64; n++) {
        uint32_t one = v[7] + (rotate(v[4], 6) ^ rotate(v[4], 11) ^ rotate(v[4], 25)) + ((v[4] & v[5]) ^ (~v[4] & v[6])) +
                       round_constants[n] + w[n];
        uint32_t two = (rotate(v[0], 2) ^ rotate(v[0], 13) ^ rotate(v[0], 22)) +
                       ((v[0] & v[1]) ^ (v[0] & v[2]) ^ (v[1] & v[2]));
        memmove(v + 1, v, 7 * sizeof *v);
        v[4] += one;
        v[0] = one + two;
    }
    for (int n = 0; n < 8; n++)
        state[n] += v[n];
}

static int do_sha256sum(int argc, char **argv) {
    (void)argc, (void)argv;
    uint32_t state[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    unsigned char tail[128] = {0};
    uint64_t total = 0;
    size_t kept = 0;
    for (;;) {
        ssize_t got = read(0, block + kept, sizeof block - kept);
        if (got < 0)
            return failed("standard input");
        if (got == 0)
            break;
        total += (uint64_t)got, kept += (size_t)got;
        size_t at = 0;
        for (; kept - at >= 64; at += 64)
            digest_chunk(state, (unsigned char *)block + at);
        memmove(block, block + at, kept -= at);
    }
    memcpy(tail, block, kept);
    tail[kept] = 0x80;
    size_t size = kept < 56 ? 64 : 128;
    for (size_t n = 0; n < 8; n++)
        tail[size - 1 - n] = (unsigned char)(total * 8 >> 8 * n);
    for (size_t at = 0; at < size; at += 64)
        digest_chunk(state, tail + at);
    char text[64];
    for (size_t n = 0; n < 64; n++)
        text[n] = "0123456789abcdef"[state[n / 8] >> (28 - 4 * (n % 8)) & 15];
    put(1, text, sizeof text), say(1, "  -\n");
    return 0;
}

/* --- time and memory --- */

static uint64_t now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000 + (uint64_t)time.tv_nsec;
}

static int do_sleep(int argc, char **argv) {
    if (argc != 2)
        return 64;
    uint64_t length = nanoseconds(argv[1]);
    struct timespec time = {.tv_sec = (time_t)(length / 1000000000), .tv_nsec = (long)(length % 1000000000)};
    return nanosleep(&time, NULL) ? failed("nanosleep") : 0;
}

/* `spin [SECONDS]`: computes, and calls nobody but a clock now and then. */
static int do_spin(int argc, char **argv) {
    volatile uint32_t turns = 0;
    uint64_t end = argc > 1 ? now() + nanoseconds(argv[1]) : 0;
    for (;;) {
        turns++;
        if (argc > 1 && turns % 4096 == 0 && now() >= end)
            return 0;
    }
}

/* `ask`: asks the host for the time, over and over. */
static int do_ask(int argc, char **argv) {
    (void)argc, (void)argv;
    for (;;)
        (void)now();
}

static char *touched(size_t size) {
    char *data = malloc(size);
    for (size_t at = 0; data && at < size; at += 4096)
        ((volatile char *)data)[at] = 1;
    return data;
}

/* `fit N`: so many bytes of memory, each page of it used. What is refused is this program's end, as it is for most. */
static int do_fit(int argc, char **argv) {
    if (argc != 2)
        return 64;
    if (!touched((size_t)number(argv[1])))
        abort();
    say(1, "fits\n");
    return 0;
}

/* `eat`: memory, until there is none. */
static int do_eat(int argc, char **argv) {
    (void)argc, (void)argv;
    while (touched(MIB))
        continue;
    abort();
}

/* --- files --- */

static int write_file(int argc, char **argv, int flags) {
    if (argc != 3)
        return 64;
    int fd = open(argv[1], O_WRONLY | O_CREAT | flags, 0666);
    if (fd < 0)
        return failed(argv[1]);
    size_t size = unescape(argv[2]);
    if (write(fd, argv[2], size) != (ssize_t)size)
        return failed(argv[1]);
    return close(fd) ? failed(argv[1]) : 0;
}

static int do_store(int argc, char **argv) { return write_file(argc, argv, O_TRUNC); }
static int do_append(int argc, char **argv) { return write_file(argc, argv, O_APPEND); }

static int do_rm(int argc, char **argv) {
    for (int n = 1; n < argc; n++)
        if (unlink(argv[n]))
            return failed(argv[n]);
    return 0;
}

static int do_mkdir(int argc, char **argv) {
    for (int n = 1; n < argc; n++)
        if (mkdir(argv[n], 0777))
            return failed(argv[n]);
    return 0;
}

static int do_rmdir(int argc, char **argv) {
    for (int n = 1; n < argc; n++)
        if (rmdir(argv[n]))
            return failed(argv[n]);
    return 0;
}

static int do_mv(int argc, char **argv) {
    if (argc != 3)
        return 64;
    return rename(argv[1], argv[2]) ? failed(argv[1]) : 0;
}

/* `ln TARGET PATH`: a symbolic link. */
static int do_ln(int argc, char **argv) {
    if (argc != 3)
        return 64;
    return symlink(argv[1], argv[2]) ? failed(argv[2]) : 0;
}

static int by_name(const void *one, const void *other) { return strcmp(*(char *const *)one, *(char *const *)other); }

/* `ls PATH...`: the names in it, in order, a line each. */
static int do_ls(int argc, char **argv) {
    for (int n = 1; n < argc; n++) {
        DIR *directory = opendir(argv[n]);
        if (!directory)
            return failed(argv[n]);
        char **names = NULL;
        size_t count = 0;
        for (struct dirent *entry; (entry = readdir(directory));) {
            if (is(entry->d_name, ".") || is(entry->d_name, ".."))
                continue;
            names = realloc(names, (count + 1) * sizeof *names);
            if (!names || !(names[count++] = strdup(entry->d_name)))
                abort();
        }
        closedir(directory);
        qsort(names, count, sizeof *names, by_name);
        for (size_t at = 0; at < count; at++)
            say(1, names[at]), say(1, "\n");
    }
    return 0;
}

/* `stat PATH...`: "KIND SIZE", links not followed. */
static int do_stat(int argc, char **argv) {
    for (int n = 1; n < argc; n++) {
        struct stat found;
        if (lstat(argv[n], &found))
            return failed(argv[n]);
        say(1, S_ISREG(found.st_mode)    ? "file "
               : S_ISDIR(found.st_mode)  ? "directory "
               : S_ISLNK(found.st_mode)  ? "symlink "
               : S_ISCHR(found.st_mode)  ? "device "
               : S_ISFIFO(found.st_mode) ? "fifo "
                                         : "other ");
        say_number(1, (uint64_t)found.st_size), say(1, "\n");
    }
    return 0;
}

/* `truncate PATH N...`: the file has the first of these sizes that the file system takes. */
static int do_truncate(int argc, char **argv) {
    if (argc < 3)
        return 64;
    int fd = open(argv[1], O_WRONLY | O_CREAT, 0666);
    if (fd < 0)
        return failed(argv[1]);
    for (int n = 2; n < argc; n++)
        if (!ftruncate(fd, (off_t)number(argv[n])))
            return 0;
    return failed(argv[1]);
}

/* `fill PATH N [remove]`: a file of N zero bytes, or as many as there is room for; says its size. */
static int do_fill(int argc, char **argv) {
    if (argc < 3)
        return 64;
    int fd = open(argv[1], O_WRONLY | O_CREAT | O_TRUNC, 0666), code = 0;
    if (fd < 0)
        return failed(argv[1]);
    memset(block, 0, sizeof block);
    uint64_t size = number(argv[2]), done = 0;
    while (done < size) {
        ssize_t got = write(fd, block, size - done < BLOCK ? (size_t)(size - done) : BLOCK);
        if (got < 0) {
            code = failed(argv[1]);
            break;
        }
        done += (uint64_t)got;
    }
    struct stat found;
    if (fstat(fd, &found) || close(fd))
        return failed(argv[1]);
    if (argc > 3 && is(argv[3], "remove") && unlink(argv[1]))
        return failed(argv[1]);
    say_number(1, (uint64_t)found.st_size), say(1, "\n");
    return code;
}

/* A name in a directory: "DIRECTORY/xN". */
static const char *name_in(const char *directory, uint64_t n) {
    static char path[LINE];
    char digits[24], *at = digits + sizeof digits;
    *--at = 0;
    do
        *--at = (char)('0' + n % 10);
    while (n /= 10);
    if (strlen(directory) + sizeof digits + 2 > sizeof path)
        _exit(64);
    strcpy(path, directory), strcat(path, "/x"), strcat(path, at);
    return path;
}

static int make_empty(const char *path) {
    int fd = open(path, O_WRONLY | O_CREAT, 0666);
    return fd < 0 ? -1 : close(fd);
}

/* `files DIRECTORY N`: at most N empty files; says how many there are, and the name of the error that ended it. */
static int do_files(int argc, char **argv) {
    if (argc != 3)
        return 64;
    uint64_t end = number(argv[2]), n = 0;
    while (n < end && !make_empty(name_in(argv[1], n)))
        n++;
    say_number(1, n), say(1, " "), say(1, n < end ? error_name(errno) : "none"), say(1, "\n");
    return 0;
}

/* `litter DIRECTORY`: empty files without end, also when there is no room. */
static int do_litter(int argc, char **argv) {
    if (argc != 2)
        return 64;
    for (uint64_t n = 0;; n++)
        (void)make_empty(name_in(argv[1], n));
}

/* `churn DIRECTORY`: 50 files come and go, without end. */
static int do_churn(int argc, char **argv) {
    if (argc != 2)
        return 64;
    for (;;) {
        for (uint64_t n = 0; n < 50; n++)
            if (make_empty(name_in(argv[1], n)))
                return failed(argv[1]);
        for (uint64_t n = 0; n < 50; n++)
            if (unlink(name_in(argv[1], n)))
                return failed(argv[1]);
    }
}

/* `refill PATH`: one file, filled and emptied without end, also when there is no room. */
static int do_refill(int argc, char **argv) {
    if (argc != 2)
        return 64;
    memset(block, 0, sizeof block);
    for (;;) {
        int fd = open(argv[1], O_WRONLY | O_CREAT | O_TRUNC, 0666);
        if (fd < 0)
            return failed(argv[1]);
        while (write(fd, block, sizeof block) > 0)
            continue;
        close(fd);
    }
}

/* `whole PATH N`: reads a file again and again; 1 when it once has not N bytes that are all the same. */
static int do_whole(int argc, char **argv) {
    if (argc != 3)
        return 64;
    for (;;) {
        int fd = open(argv[1], O_RDONLY);
        if (fd < 0)
            return failed(argv[1]);
        uint64_t size = 0;
        int first = -1;
        ssize_t got;
        while ((got = read(fd, block, sizeof block)) > 0)
            for (ssize_t n = 0; n < got; n++, size++)
                if (first < 0)
                    first = block[n];
                else if (block[n] != (char)first)
                    return 1;
        close(fd);
        if (got < 0 || size != number(argv[2]))
            return 1;
    }
}

/* `swap ONE OTHER PATH`: a link at PATH that leads now here and now there, without end. */
static int do_swap(int argc, char **argv) {
    if (argc != 4)
        return 64;
    char next[LINE];
    if (strlen(argv[3]) + 6 > sizeof next)
        return 64;
    strcpy(next, argv[3]), strcat(next, ".next");
    for (int n = 0;; n = !n)
        if (symlink(argv[1 + n], next) || rename(next, argv[3]))
            return failed(argv[3]);
}

/* `deep PATH N`: N directories, each in the one before it. */
static int do_deep(int argc, char **argv) {
    if (argc != 3)
        return 64;
    int at = open(argv[1], O_RDONLY | O_DIRECTORY);
    for (uint64_t n = number(argv[2]); n > 0; n--) {
        if (at < 0 || mkdirat(at, "d", 0777))
            return failed(argv[1]);
        int below = openat(at, "d", O_RDONLY | O_DIRECTORY);
        close(at);
        at = below;
    }
    return at < 0 ? failed(argv[1]) : 0;
}

/* --- what it finds --- */

extern char **environ;

/* `env`: NAME=VALUE, each ended by a NUL, as `env -0` does. `env NAME`: its value alone. */
static int do_env(int argc, char **argv) {
    if (argc > 1) {
        const char *value = getenv(argv[1]);
        return value ? say(1, value), 0 : 1;
    }
    for (char **at = environ; at && *at; at++)
        put(1, *at, strlen(*at) + 1);
    return 0;
}

/* `args ...`: its words, each ended by a NUL. */
static int do_args(int argc, char **argv) {
    for (int n = 1; n < argc; n++)
        put(1, argv[n], strlen(argv[n]) + 1);
    return 0;
}

static int do_pwd(int argc, char **argv) {
    (void)argc, (void)argv;
    char path[LINE];
    if (!getcwd(path, sizeof path))
        return failed("getcwd");
    say(1, path), say(1, "\n");
    return 0;
}

/* `fds`: the numbers of open descriptors but those of the directories that were given, a line each. */
static int do_fds(int argc, char **argv) {
    (void)argc, (void)argv;
    for (uint32_t fd = 0; fd < 1024; fd++) {
        __wasi_fdstat_t found;
        __wasi_prestat_t given;
        if (!__wasi_fd_fdstat_get(fd, &found) && __wasi_fd_prestat_get(fd, &given))
            say_number(1, fd), say(1, "\n");
    }
    return 0;
}

/* `random N`: so many random bytes. */
static int do_random(int argc, char **argv) {
    if (argc != 2 || number(argv[1]) > BLOCK)
        return 64;
    size_t size = (size_t)number(argv[1]);
    if (__wasi_random_get((uint8_t *)block, size))
        return 1;
    put(1, block, size);
    return 0;
}

/* `sockets`: the numbers of the descriptors that are sockets, a line each. WASI can be given one, and open none. */
static int do_sockets(int argc, char **argv) {
    (void)argc, (void)argv;
    for (uint32_t fd = 0; fd < 1024; fd++) {
        __wasi_fdstat_t found;
        if (!__wasi_fd_fdstat_get(fd, &found) && (found.fs_filetype == __WASI_FILETYPE_SOCKET_STREAM ||
                                                  found.fs_filetype == __WASI_FILETYPE_SOCKET_DGRAM))
            say_number(1, fd), say(1, "\n");
    }
    return 0;
}

static command do_do;

static const struct {
    const char *name;
    command *run;
} commands[] = {
    {"abort", do_abort}, {"append", do_append}, {"args", do_args}, {"ask", do_ask}, {"await", do_read},
    {"cat", do_cat}, {"churn", do_churn}, {"count", do_count}, {"deep", do_deep}, {"divide", do_divide},
    {"do", do_do}, {"eat", do_eat}, {"echo", do_echo}, {"env", do_env}, {"err", do_err}, {"exit", do_exit},
    {"fds", do_fds}, {"files", do_files}, {"fill", do_fill}, {"fit", do_fit}, {"flood", do_flood},
    {"litter", do_litter}, {"ln", do_ln}, {"ls", do_ls}, {"mkdir", do_mkdir}, {"mv", do_mv}, {"out", do_out},
    {"pwd", do_pwd}, {"random", do_random}, {"read", do_read}, {"refill", do_refill}, {"rm", do_rm},
    {"rmdir", do_rmdir}, {"sha256sum", do_sha256sum}, {"sleep", do_sleep}, {"sockets", do_sockets}, {"spin", do_spin},
    {"stat", do_stat}, {"store", do_store}, {"swap", do_swap}, {"true", do_true}, {"truncate", do_truncate},
    {"whole", do_whole}, {"write", do_write},
};

/* `do A x ; B y`: one after the other, up to the first that fails, whose code it is. */
static int do_do(int argc, char **argv) {
    int code = 0;
    for (int begin = 1; begin < argc && !code;) {
        int end = begin;
        while (end < argc && !is(argv[end], ";"))
            end++;
        code = 127;
        for (size_t n = 0; n < sizeof commands / sizeof *commands; n++)
            if (end > begin && is(argv[begin], commands[n].name))
                code = commands[n].run(end - begin, argv + begin);
        begin = end + 1;
    }
    return code;
}

int main(int argc, char **argv) {
    /* WASI has no working directory. What starts programs says it in PWD; wasi-libc keeps one of its own. */
    const char *directory = getenv("PWD");
    if (directory && chdir(directory))
        return failed(directory);
    if (argc < 1)
        return 64;
    char *name = strrchr(argv[0], '/') ? strrchr(argv[0], '/') + 1 : argv[0];
    char *ending = strrchr(name, '.');
    size_t size = ending && is(ending, ".wasm") ? (size_t)(ending - name) : strlen(name);
    if (size == 4 && !strncmp(name, "tool", 4))
        return do_do(argc, argv);
    for (size_t n = 0; n < sizeof commands / sizeof *commands; n++)
        if (strlen(commands[n].name) == size && !strncmp(name, commands[n].name, size))
            return commands[n].run(argc, argv);
    say(2, "tool: no such command: "), say(2, name), say(2, "\n");
    return 127;
}
