// Keys in the order of their last use.

#pragma once

#include <cstdint>
#include <functional>
#include <vector>

namespace moe {

class LeastRecentlyUsed {
 public:
    using Key = int32_t;

    // Keys are 0 to n_key - 1; none is known at first.
    explicit LeastRecentlyUsed(int64_t n_key) : links_(static_cast<size_t>(n_key) + 1), end_(static_cast<Key>(n_key)) {
        at(end_) = {end_, end_};
    }

    void insert(Key key) {  // not known yet
        const Key newest = at(end_).previous;
        at(key) = {newest, end_};
        at(newest).next = key;
        at(end_).previous = key;
        ++size_;
    }
    void remove(Key key) {
        Links& links = at(key);
        at(links.previous).next = links.next;
        at(links.next).previous = links.previous;
        links = {};
        --size_;
    }
    void touch(Key key) {  // a use of a known key
        remove(key);
        insert(key);
    }
    // Removes and returns the key whose last use is longest ago among those that may leave, -1 if there is none.
    Key victim(const std::function<bool(Key)>& may_leave) {
        Key key = at(end_).next;
        while (key != end_ && !may_leave(key)) key = at(key).next;
        if (key == end_) return -1;
        remove(key);
        return key;
    }
    bool contains(Key key) const { return links_[static_cast<size_t>(key)].next >= 0; }
    int64_t size() const { return size_; }

 private:
    // A ring through the known keys, oldest first, that begins and ends at the one entry behind all keys.
    struct Links {
        Key previous = -1, next = -1;
    };
    Links& at(Key key) { return links_[static_cast<size_t>(key)]; }

    std::vector<Links> links_;
    Key end_;
    int64_t size_ = 0;
};

}  // namespace moe
