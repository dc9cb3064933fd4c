/* PAGEMAP_SCAN in pieces, as a tool in C does it: scanner PID START END VEC_LEN MAX_PAGES FLAGS INVERTED MASK ANYOF RETURN
   Prints a line a call (return value or -errno, walk_end), and a line a region. Goes on at walk_end until END. */
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>

struct region { uint64_t start, end, categories; };
struct argument {
    uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages, inverted, mask, anyof, shown;
};
#define SCAN _IOWR('f', 16, struct argument)

int main(int argc, char **argv)
{
    uint64_t n[11];
    char path[64];
    if (argc != 11)
        return 2;
    for (int i = 1; i < 11; i++)
        n[i] = strtoull(argv[i], 0, 0);
    snprintf(path, sizeof path, "/proc/%s/pagemap", argv[1]);
    int fd = open(path, O_RDONLY);
    if (fd < 0) {
        perror(path);
        return 1;
    }
    struct region *vec = calloc(n[4] + 1, sizeof *vec);
    for (uint64_t at = n[2]; at < n[3];) {
        struct argument a = {sizeof a, n[6], at, n[3], 0, n[4] ? (uintptr_t)vec : 0, n[4], n[5], n[7], n[8], n[9], n[10]};
        int found = ioctl(fd, SCAN, &a);
        printf("%d %llx\n", found < 0 ? -errno : found, found < 0 ? 0ULL : (unsigned long long)a.walk_end);
        for (int i = 0; i < found; i++)
            printf(" %llx %llx %llx\n", (unsigned long long)vec[i].start, (unsigned long long)vec[i].end,
                   (unsigned long long)vec[i].categories);
        if (found < 0 || a.walk_end <= at)
            break;
        at = a.walk_end;
    }
    return 0;
}
