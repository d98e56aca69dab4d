#include "io_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>

namespace io {

namespace {

int open_retrying(const std::string& path, int flags) {
    int fd;
    do {
        fd = ::open(path.c_str(), flags | O_CLOEXEC, 0600);
    } while (fd < 0 && errno == EINTR);
    return fd;
}

void close_fd(int& fd) {
    if (fd >= 0) ::close(fd);
    fd = -1;
}

}  // namespace

File::~File() {
    close_fd(direct_fd);
    close_fd(buffered_fd);
}

int File::open(const std::string& path_, bool writable_, bool create) {
    path = path_;
    writable = writable_;
    const int flags = writable ? O_RDWR : O_RDONLY;
    struct stat status;
    if (::stat(path.c_str(), &status) == 0 && !S_ISREG(status.st_mode))  // before open(), which waits on a named pipe
        return S_ISDIR(status.st_mode) ? EISDIR : EINVAL;
    buffered_fd = open_retrying(path, flags | (create ? O_CREAT : 0));
    if (buffered_fd < 0) return errno;
    if (::fstat(buffered_fd, &status) != 0) {
        const int error = errno;
        close_fd(buffered_fd);
        return error;
    }
#ifdef O_DIRECT
    direct_fd = open_retrying(path, flags | O_DIRECT);
    // The name may have been given to another file between the two calls; both descriptors must mean the same one.
    struct stat again;
    if (direct_fd >= 0 && (::fstat(direct_fd, &again) != 0 || again.st_ino != status.st_ino || again.st_dev != status.st_dev))
        close_fd(direct_fd);
#endif
    direct = direct_fd >= 0;
    return 0;
}

int File::sync() {
    int result;
    do {
#ifdef __APPLE__
        result = ::fsync(buffered_fd);
#else
        result = ::fdatasync(buffered_fd);
#endif
    } while (result != 0 && errno == EINTR);
    if (result != 0) return errno;
    drop_cache(0, 0);
    return 0;
}

void File::drop_cache(uint64_t offset, uint64_t bytes) const {
#ifdef POSIX_FADV_DONTNEED
    ::posix_fadvise(buffered_fd, static_cast<off_t>(offset), static_cast<off_t>(bytes), POSIX_FADV_DONTNEED);
#else
    (void)offset;
    (void)bytes;
#endif
}

int64_t File::size() const {
    struct stat status;
    return ::fstat(buffered_fd, &status) == 0 ? static_cast<int64_t>(status.st_size) : -1;
}

}  // namespace io
