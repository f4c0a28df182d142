// Objects known by handles. A handle is a number that is never given out again, so that a destroyed one is recognised for ever.
#pragma once
#include <cstdint>
#include <memory>
#include <unordered_map>
#include <utility>

namespace kv8::emulated {

// Of all kinds together, so that a handle of one kind is no handle of another. Called with the state locked.
inline uintptr_t next_handle() {
    // Beyond the numbers that the driver gives a meaning of their own (the default streams).
    static uintptr_t last = 0x10000;
    return last += 16;
}

template <class Handle, class Object>
class Handles {
public:
    template <class... Arguments>
    Handle add(Arguments&&... arguments) {
        auto object = std::make_unique<Object>(Object{std::forward<Arguments>(arguments)...});
        const auto handle = reinterpret_cast<Handle>(next_handle());
        objects_.emplace(handle, std::move(object));
        return handle;
    }

    // nullptr: no such object, or no more.
    Object* find(Handle handle) const {
        const auto found = objects_.find(handle);
        return found == objects_.end() ? nullptr : found->second.get();
    }

    bool remove(Handle handle) { return objects_.erase(handle) != 0; }

    // Those that `is_of` is true of.
    template <class IsOf>
    void remove_all(IsOf is_of) {
        for (auto entry = objects_.begin(); entry != objects_.end();) {
            entry = is_of(*entry->second) ? objects_.erase(entry) : std::next(entry);
        }
    }

    template <class Visit>
    void for_each(Visit visit) const {
        for (const auto& [handle, object] : objects_) visit(*object);
    }

private:
    std::unordered_map<Handle, std::unique_ptr<Object>> objects_;
};

}  // namespace kv8::emulated
