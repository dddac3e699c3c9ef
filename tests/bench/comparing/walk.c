/* walk [-r] DIRECTORY: visits everything below a directory with one thread per core and prints what it saw.
 *
 * Without -r it calls fstatat on every entry: what no backup of an unchanged tree can do without, hence its limit.
 * With -r it reads every regular file, too: that fills the page cache before something is timed. */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { THREADS_MAX = 64, READ_BYTES = 1 << 18 };

/* A stack of directories that wait to be visited; `busy` threads may still add to it. */
static char **pending;
static size_t waiting, capacity;
static int busy;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static int reading;
static long long entries, bytes;

static void fail(const char *what) {
    fprintf(stderr, "walk: %s: %s\n", what, strerror(errno));
    exit(1);
}

static void push(char *path) {
    pthread_mutex_lock(&lock);
    if (waiting == capacity) {
        capacity = capacity ? capacity * 2 : 1024;
        pending = realloc(pending, capacity * sizeof *pending);
        if (!pending) fail("memory");
    }
    pending[waiting++] = path;
    pthread_cond_signal(&changed);
    pthread_mutex_unlock(&lock);
}

/* The next directory; NULL when there is none and nobody can add one any more. */
static char *pop(int was_busy) {
    pthread_mutex_lock(&lock);
    busy -= was_busy;
    while (waiting == 0 && busy > 0) pthread_cond_wait(&changed, &lock);
    char *path = NULL;
    if (waiting > 0) {
        path = pending[--waiting];
        busy++;
    } else {
        pthread_cond_broadcast(&changed);
    }
    pthread_mutex_unlock(&lock);
    return path;
}

static void read_file(int directory, const char *name, char *buffer) {
    int file = openat(directory, name, O_RDONLY | O_NOFOLLOW);
    if (file < 0) return;
    while (read(file, buffer, READ_BYTES) > 0) {}
    close(file);
}

static void visit(const char *path, char *buffer) {
    DIR *directory = opendir(path);
    if (!directory) fail(path);
    long long seen = 0, size = 0;
    struct dirent *entry;
    while ((entry = readdir(directory))) {
        if (!strcmp(entry->d_name, ".") || !strcmp(entry->d_name, "..")) continue;
        struct stat status;
        if (fstatat(dirfd(directory), entry->d_name, &status, AT_SYMLINK_NOFOLLOW)) fail(entry->d_name);
        seen++;
        if (S_ISREG(status.st_mode)) {
            size += status.st_size;
            if (reading) read_file(dirfd(directory), entry->d_name, buffer);
        } else if (S_ISDIR(status.st_mode)) {
            char *below;
            if (asprintf(&below, "%s/%s", path, entry->d_name) < 0) fail("memory");
            push(below);
        }
    }
    closedir(directory);
    __atomic_add_fetch(&entries, seen, __ATOMIC_RELAXED);
    __atomic_add_fetch(&bytes, size, __ATOMIC_RELAXED);
}

static void *work(void *unused) {
    (void)unused;
    char *buffer = malloc(READ_BYTES), *path = NULL;
    if (!buffer) fail("memory");
    while ((path = pop(path != NULL))) {
        visit(path, buffer);
        free(path);
    }
    free(buffer);
    return NULL;
}

int main(int argc, char **argv) {
    reading = argc == 3 && !strcmp(argv[1], "-r");
    if (argc != 2 + reading) {
        fputs("usage: walk [-r] DIRECTORY\n", stderr);
        return 2;
    }
    push(strdup(argv[argc - 1]));
    long cores = sysconf(_SC_NPROCESSORS_ONLN);
    int count = cores < 1 ? 1 : cores > THREADS_MAX ? THREADS_MAX : (int)cores;
    pthread_t threads[THREADS_MAX];
    for (int i = 0; i < count; i++)
        if (pthread_create(&threads[i], NULL, work, NULL)) fail("thread");
    for (int i = 0; i < count; i++) pthread_join(threads[i], NULL);
    printf("%lld entries, %lld bytes\n", entries, bytes);
    return 0;
}
