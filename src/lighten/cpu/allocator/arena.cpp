// The memory of PyTorch's tensors on a processor, apart from everybody else's.
//
// In glibc's heap a tensor's block lies among small objects that outlive it: what they leave between
// them is too small for the next step's blocks, and a process comes to hold a quarter more than it
// uses. Here are large blocks alone. The smallest free piece that is large enough is taken, free
// neighbours are joined at once, and pages once written stay with the process until they are asked
// back. `lighten/plan/allocators.py` has the same in Python, to tell beforehand what will be held.

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <map>
#include <mutex>
#include <set>
#include <utility>

#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>

namespace {

constexpr int64_t LINE = 64;         // of a cache: PyTorch's alignment
constexpr int64_t LEAST = 64 << 10;  // bytes of a block here; smaller ones are glibc's

class Arena {
public:
    bool open(int64_t bytes) {
        if (base != nullptr) return true;
        void* found = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (found == MAP_FAILED) return false;
        base = static_cast<char*>(found), size = bytes;
        return true;
    }

    // nullptr: there is no room.
    void* take(int64_t bytes) {
        const std::lock_guard<std::mutex> held(mutex);
        // A line more than is needed, or blocks of powers of two would all begin in the same sets
        // of the first cache.
        const int64_t wanted = (bytes + LINE - 1) / LINE * LINE + LINE;
        if (!in_use) return nullptr;
        int64_t start = top;
        const auto found = sizes.lower_bound({wanted, 0});
        if (found != sizes.end()) {
            const int64_t whole = found->first;
            start = found->second;
            drop(pieces.find(start));
            if (whole > wanted) put(start + wanted, whole - wanted);
        } else if (wanted > size - top) {
            return nullptr;
        } else {
            top += wanted;
            written = std::max(written, top);
        }
        blocks[start] = wanted;
        return base + start;
    }

    void give(void* block) {
        const std::lock_guard<std::mutex> held(mutex);
        const auto own = blocks.find(static_cast<char*>(block) - base);
        int64_t start = own->first, length = own->second;
        blocks.erase(own);
        auto after = pieces.lower_bound(start);
        if (after != pieces.begin()) {
            const auto before = std::prev(after);
            if (before->first + before->second == start) {
                start = before->first, length += before->second;
                drop(before);
            }
        }
        if (after != pieces.end() && after->first == start + length) {
            length += after->second;
            drop(after);
        }
        if (start + length == top) top = start; else put(start, length);
    }

    // Give the pages of all free pieces back to the system.
    void trim() {
        const std::lock_guard<std::mutex> held(mutex);
        for (const auto& [start, length] : pieces) give_back(start, start + length);
        give_back(top, written);
        written = top;
    }

    bool has(const void* block) const { return block >= base && block < base + size; }

    char* base = nullptr;
    bool in_use = false;
    std::mutex mutex;

private:
    void put(int64_t start, int64_t length) {
        pieces[start] = length;
        sizes.insert({length, start});
    }

    void drop(std::map<int64_t, int64_t>::iterator piece) {
        sizes.erase({piece->second, piece->first});
        pieces.erase(piece);
    }

    void give_back(int64_t start, int64_t end) {
        const int64_t page = sysconf(_SC_PAGESIZE);
        start = (start + page - 1) / page * page;
        end = end == written ? (end + page - 1) / page * page : end / page * page;
        if (start < end) madvise(base + start, end - start, MADV_DONTNEED);
    }

    int64_t size = 0, top = 0, written = 0;
    std::map<int64_t, int64_t> blocks, pieces;      // length by start: in use, free
    std::set<std::pair<int64_t, int64_t>> sizes;  // (length, start) of free pieces
};

// Never destroyed: tensors may outlive everything else.
Arena& arena() {
    static Arena* const only = new Arena;
    return *only;
}

void release(void* block) {
    if (block == nullptr) return;
    c10::profiledCPUMemoryReporter().Delete(block);
    if (arena().has(block)) arena().give(block); else c10::free_cpu(block);
}

struct Allocator final : c10::Allocator {
    c10::DataPtr allocate(size_t bytes) override {
        void* block = static_cast<int64_t>(bytes) < LEAST ? nullptr : arena().take(bytes);
        if (block == nullptr) block = c10::alloc_cpu(bytes);
        c10::profiledCPUMemoryReporter().New(block, bytes);
        return {block, block, &release, c10::Device(c10::DeviceType::CPU)};
    }
    c10::DeleterFnPtr raw_deleter() const override { return &release; }
    void copy_data(void* to, const void* from, size_t bytes) const override {
        default_copy_data(to, from, bytes);
    }
};

}  // namespace

extern "C" {

// From now on tensors' memory comes out of so many bytes of address space; where it begins, or 0.
uint64_t lighten_arena_open(int64_t bytes) {
    if (arena().base == nullptr) {
        if (!arena().open(bytes)) return 0;
        // A child must not find the lock held by a thread that it does not have.
        pthread_atfork([] { arena().mutex.lock(); }, [] { arena().mutex.unlock(); },
                       [] { arena().mutex.unlock(); });
        c10::SetCPUAllocator(new Allocator, 1);
    }
    arena().in_use = true;
    return reinterpret_cast<uint64_t>(arena().base);
}

// Whether further blocks come out of it.
void lighten_arena_use(int in_use) {
    const std::lock_guard<std::mutex> held(arena().mutex);
    arena().in_use = in_use != 0;
}

void lighten_arena_trim() { arena().trim(); }
}
