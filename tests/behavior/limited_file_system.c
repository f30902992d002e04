/* LD_PRELOAD library that imitates a limited file system.

   LACKS  names missing features, separated by spaces: link, fsync, folder_fsync, folder_rename,
          flock.
   FULL   makes writes to files whose path contains this text fail for lack of space.
   SLOW   makes fsync of files whose path contains this text take a second. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static int lacks(const char *feature) {
  char words[256];
  const char *value = getenv("LACKS");
  if (!value || strlen(value) >= sizeof words) return 0;
  strcpy(words, value);
  for (char *save, *word = strtok_r(words, " ", &save); word; word = strtok_r(NULL, " ", &save))
    if (!strcmp(word, feature)) return 1;
  return 0;
}

static int refuse(int number) { errno = number; return -1; }

static int is_named(int descriptor, const char *variable) {
  char link[64], path[4096];
  const char *name = getenv(variable);
  if (!name) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
  ssize_t length = readlink(link, path, sizeof path - 1);
  if (length <= 0) return 0;
  path[length] = 0;
  return strstr(path, name) != NULL;
}

ssize_t write(int descriptor, const void *data, size_t size) {
  if (is_named(descriptor, "FULL")) return refuse(ENOSPC);
  return ((ssize_t (*)(int, const void *, size_t))dlsym(RTLD_NEXT, "write"))(descriptor, data, size);
}

int link(const char *from, const char *to) {
  if (lacks("link")) return refuse(EPERM);
  return ((int (*)(const char *, const char *))dlsym(RTLD_NEXT, "link"))(from, to);
}

int linkat(int a, const char *from, int b, const char *to, int flags) {
  if (lacks("link")) return refuse(EPERM);
  return ((int (*)(int, const char *, int, const char *, int))dlsym(RTLD_NEXT, "linkat"))(a, from, b, to, flags);
}

int fsync(int descriptor) {
  struct stat entry;
  int folder = !fstat(descriptor, &entry) && S_ISDIR(entry.st_mode);
  if (is_named(descriptor, "SLOW")) sleep(1);
  if (folder ? lacks("folder_fsync") : lacks("fsync")) return refuse(EINVAL);
  return ((int (*)(int))dlsym(RTLD_NEXT, "fsync"))(descriptor);
}

int rename(const char *from, const char *to) {
  struct stat entry;
  if (lacks("folder_rename") && !stat(from, &entry) && S_ISDIR(entry.st_mode)) return refuse(ENOSYS);
  return ((int (*)(const char *, const char *))dlsym(RTLD_NEXT, "rename"))(from, to);
}

int flock(int descriptor, int operation) {
  if (lacks("flock")) return refuse(ENOLCK);
  return ((int (*)(int, int))dlsym(RTLD_NEXT, "flock"))(descriptor, operation);
}
