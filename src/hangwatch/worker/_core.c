/* The core in C: what core.py does, each step one call that nothing can interrupt.
 *
 * core.py is the reference and has the reasons; the same tests run over both. Everything here
 * runs under the GIL: an interpreter without one, or with one of its own, uses core.py.
 * Stable ABI of CPython 3.11: docs.python.org/3/c-api/stable.html.
 */
#define _GNU_SOURCE
#define Py_LIMITED_API 0x030B0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structmember.h>
#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

/* page/layout.py; `LAYOUT` is compared with it when this is imported. */
enum { LAYOUT = 3, HEADER_BYTES = 512, SLOT_BYTES = 320, WATCH_UNTIL = 2, SLOTS_IN_USE = 3 };
enum { DEADLINE = 0, ENTRY = 2, LIMIT = 3, IDENT = 4, TASK = 7, SKIPPED_ENTRY = 8,
       RENEWED_ENTRY = 10, ENTERED = 11, RENEWED_LIMIT = 12, RAISED_ENTRY = 13 };
static const double GENERATION = 4294967296.0, GENERATIONS = 1048576.0; /* 2**32, 2**20 */
enum { DETAILS_BYTES = SLOT_BYTES - LIMIT * 8, BUCKETS = 64, MOST_KEYS = 64 };

typedef _Atomic double Word;
typedef struct State State; typedef struct Thread Thread; typedef struct Slots Slots;

/* What a block is to its thread. */
typedef struct {
    double after;
    PyObject *scope; /* str, or the code that called expires */
    PyObject *asked; /* what else the caller chose, or NULL */
    int lasti;       /* of that call; -1 if the scope has a name */
    Py_hash_t hash;
} What;
/* core._Key. */
typedef struct Key {
    What what;
    Slots *slots;
    struct Slot *free;
    int quiet, nests, known;
    long users; /* open blocks, and calls that arm one: only then it stays once it is not known */
    struct Key *next;
} Key;
/* core.Slot. */
typedef struct Slot {
    Word *words;
    double entry, task;
    Key *key;                   /* NULL: it is free in its page */
    Thread *thread;             /* whose block is open; NULL: none is, or its thread has ended */
    struct Slot *next;          /* in a list of free ones */
    struct Slot *older, *newer; /* in its thread's list of open ones, in order of entry */
} Slot;
/* core._Thread. */
struct Thread {
    State *state;
    Key *table[BUCKETS];
    long keys;
    Slot *newest;
    PyObject *loop_holder, *loop; /* see running_loop */
    Thread *next;
};
/* core.Slots. */
struct Slots {
    PyObject_HEAD
    State *state;
    Py_buffer memory;
    Word *words;
    PyObject *ring;
    int closed;
    Slots *next;
    Slot *free;
    Py_ssize_t capacity, given_out;
    Slot rows[];
};
/* core.Expiration. */
typedef struct {
    PyObject_HEAD
    State *state;
    What what;
    Slot *slot;      /* while it is open, if it has one */
    PyObject *other; /* what else begins and ends with it */
    char entered;
    char awaited; /* by `async with`, next: 1, its __aenter__; 2, its __aexit__ */
} Block;
/* One interpreter's. */
struct State {
    PyTypeObject *block_type, *slots_type;
    PyObject *hooks; /* what Python decides: core.Hooks */
    PyObject *running_loop, *tasks;
    PyObject *lasti_name, *after_name, *scope_name, *loop_name;
    volatile char *token; /* 1; the kernel makes it 0 in every forked child */
    long forks, ended;
    Slots *pages;
    Thread *threads;
};

static _Thread_local Thread *this_thread;
static State *state_of(PyObject *module) { return *(State **)PyModule_GetState(module); }
static inline double load(Word *word) { return atomic_load_explicit(word, memory_order_relaxed); }
static inline void store(Word *word, double value) {
    atomic_store_explicit(word, value, memory_order_release);
}
static inline double monotonic(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

/* ---- keys */

static Slot *take(Slot **list) {
    Slot *slot = *list;
    if (slot) *list = slot->next;
    return slot;
}
static void put(Slot **list, Slot *slot) {
    slot->next = *list;
    *list = slot;
}
static void give_back(Slot *slot) {
    store(slot->words + IDENT, 0.0); /* the thread's name is nobody's from here on */
    put(&slot->key->slots->free, slot);
    slot->key = NULL;
}
/* May run code of others. */
static void free_key(Key *key) {
    Py_DECREF(key->what.scope);
    Py_XDECREF(key->what.asked);
    Py_DECREF((PyObject *)key->slots);
    PyMem_Free(key);
}
static void release(Key *key) { if (--key->users == 0 && !key->known) free_key(key); }
/* Have one thread ask at its next blocks, or all (NULL). */
static void forget_keys(State *state, Thread *only) {
    Key *gone = NULL, *key;
    for (Thread *thread = state->threads; thread; thread = thread->next) {
        for (int i = 0; i < BUCKETS && (!only || only == thread); i++) {
            while ((key = thread->table[i])) {
                thread->table[i] = key->next;
                thread->keys--;
                key->known = 0;
                while (key->free) give_back(take(&key->free));
                if (key->users) continue;
                key->next = gone;
                gone = key;
            }
        }
    }
    /* Only after all else, for a thread may end meanwhile. */
    while ((key = gone)) {
        gone = key->next;
        free_key(key);
    }
}
/* The first look of a forked child, whoever forked it: the pages are its own from here on. */
static void __attribute__((noinline)) forget_parent(State *state) {
    for (Slots *slots = state->pages; slots; slots = slots->next) {
        mmap(slots->memory.buf, (size_t)slots->memory.len, PROT_READ | PROT_WRITE,
             MAP_PRIVATE | MAP_FIXED | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        slots->closed = 1;
    }
    state->forks++;
    *state->token = 1;
    forget_keys(state, NULL);
}
static inline void check_fork(State *state) {
    if (__builtin_expect(!*state->token, 0)) forget_parent(state);
}
/* By identity where there is no name, so that no code of others runs. */
static int is_same(What *one, What *other) {
    if (one->hash != other->hash || one->lasti != other->lasti || one->after != other->after)
        return 0;
    if (one->scope != other->scope &&
        (one->lasti >= 0 || PyUnicode_Compare(one->scope, other->scope) != 0))
        return 0;
    if (!one->asked || !other->asked) return one->asked == other->asked;
    for (Py_ssize_t i = 0; i < PyTuple_Size(one->asked); i++) /* they are as long */
        if (PyTuple_GetItem(one->asked, i) != PyTuple_GetItem(other->asked, i)) return 0;
    return 1;
}
static Key *find_key(Thread *thread, What *what) {
    Key *key = thread->table[what->hash & (BUCKETS - 1)];
    while (key && !is_same(&key->what, what)) key = key->next;
    return key;
}
/* Whether a thread may be in a block of that name. Of places, the hooks know what line they are. */
static int is_within(Thread *thread, What *what) {
    for (Slot *slot = thread->newest; slot; slot = slot->older) {
        What *around = &slot->key->what;
        if ((around->lasti < 0) != (what->lasti < 0)) continue;
        if (what->lasti >= 0 || PyUnicode_Compare(around->scope, what->scope) == 0) return 1;
    }
    return 0;
}

static Key *new_key(Thread *thread, What *what, Slots *slots) {
    Key *key = PyMem_Calloc(1, sizeof *key);
    if (!key) return (Key *)PyErr_NoMemory();
    Key **at = &thread->table[what->hash & (BUCKETS - 1)];
    *key = (Key){*what, (Slots *)Py_NewRef((PyObject *)slots), .known = 1, .next = *at};
    Py_INCREF(what->scope);
    Py_XINCREF(what->asked);
    *at = key;
    thread->keys++;
    return key;
}

/* ---- threads */

static void thread_ends(PyObject *capsule) {
    Thread *thread = PyCapsule_GetPointer(capsule, "hangwatch.thread");
    State *state = thread->state;
    if (this_thread == thread) this_thread = NULL;
    check_fork(state);
    for (Slot *slot; (slot = thread->newest); slot->thread = NULL, slot->older = slot->newer = NULL)
        thread->newest = slot->older;
    forget_keys(state, thread);
    Thread **at = &state->threads;
    while (*at != thread) at = &(*at)->next;
    *at = thread->next;
    Py_XDECREF(thread->loop_holder);
    PyMem_Free(thread);
}
static Thread *thread_of(State *state) {
    if (__builtin_expect(this_thread && this_thread->state == state, 1)) return this_thread;
    PyObject *dict = PyThreadState_GetDict(), *name = (PyObject *)state->block_type;
    PyObject *capsule = dict ? PyDict_GetItem(dict, name) : NULL; /* this interpreter's, ours */
    if (capsule) return this_thread = PyCapsule_GetPointer(capsule, "hangwatch.thread");
    Thread *thread = dict ? PyMem_Calloc(1, sizeof *thread) : NULL;
    if (!thread) return (Thread *)PyErr_NoMemory();
    thread->state = state;
    thread->next = state->threads;
    state->threads = thread;
    capsule = PyCapsule_New(thread, "hangwatch.thread", thread_ends);
    if (capsule && PyDict_SetItem(dict, name, capsule) == 0) this_thread = thread;
    Py_XDECREF(capsule);
    return this_thread == thread ? thread : NULL;
}
/* Borrowed. To ask asyncio for the loop is a system call in CPython 3.11, so up to 3.12 a
 * thread asks once for what asyncio keeps in its dict, which holds the loop. */
static PyObject *running_loop(State *state, Thread *thread) {
    if (!state->running_loop) return Py_None;
    PyObject *holder = NULL;
    if (Py_Version < 0x030D0000) {
        PyObject *dict = PyThreadState_GetDict();
        holder = dict ? PyDict_GetItemWithError(dict, state->loop_name) : NULL;
        if (!holder) Py_CLEAR(thread->loop_holder);
        if (!holder || holder == Py_None) return Py_None;
        if (holder == thread->loop_holder) return thread->loop;
    }
    PyObject *loop = PyObject_CallNoArgs(state->running_loop), *before = thread->loop_holder;
    if (!loop) return PyErr_Clear(), Py_None;
    thread->loop_holder = Py_XNewRef(holder);
    Py_DECREF(thread->loop = loop); /* it runs */
    Py_XDECREF(before); /* last: it may run code of others */
    return loop;
}
/* Which task of asyncio's runs, as core.py has it. */
static double current_task(State *state, Thread *thread) {
    PyObject *loop = running_loop(state, thread), *task;
    if (loop == Py_None) return 0.0;
    if (PyDict_CheckExact(state->tasks)) task = PyDict_GetItemWithError(state->tasks, loop);
    else Py_XDECREF(task = PyObject_CallFunctionObjArgs(state->tasks, loop, NULL)); /* it runs */
    PyErr_Clear();
    return (double)(uintptr_t)(task ? task : Py_None); /* in a loop, but in no task */
}

/* ---- arming and disarming */

/* Have the block's time begin now, and the watcher know of it; the slot may be gone then. */
static int set_deadline(Block *block) {
    Slot *slot = block->slot;
    Slots *slots = slot->key->slots;
    double now = monotonic(), deadline = now + block->what.after;
    store(slot->words + DEADLINE, deadline);
    atomic_signal_fence(memory_order_seq_cst); /* the watcher's membarrier(2) is the fence */
    double until = load(slots->words + WATCH_UNTIL);
    if (__builtin_expect(now < until && until <= deadline, 1)) return 0;
    if (slots->closed || slots->ring == Py_None) return 0;

    PyObject *ring = Py_NewRef(slots->ring), *connected = PyObject_CallNoArgs(ring);
    if (connected == Py_True && block->slot == slot) {
        /* It connected first, which is not the block's time. */
        deadline = load(slot->words + DEADLINE);
        store(slot->words + DEADLINE, monotonic() + block->what.after);
        if (monotonic() >= deadline) {
            /* The first deadline may have been found overdue, and the other one not yet. */
            Py_DECREF(connected);
            connected = PyObject_CallNoArgs(ring);
        }
    }
    Py_DECREF(ring);
    Py_XDECREF(connected);
    if (connected || !block->state->ended) return connected ? 0 : -1;
    PyErr_Clear(); /* what rings may be gone */
    return 0;
}
/* What was entered later and is open still was skipped, if nothing switches within a thread. */
static void __attribute__((noinline)) note_skipped(State *state, Slot *slot) {
    PyObject *kind, *value, *traceback;
    PyErr_Fetch(&kind, &value, &traceback);
    PyObject *switches = PyObject_CallMethod(state->hooks, "switches_within_a_thread", NULL);
    while (switches == Py_False && (slot = slot->newer))
        if (slot->task == 0.0) store(slot->words + SKIPPED_ENTRY, slot->entry);
    Py_XDECREF(switches);
    PyErr_Clear();
    PyErr_Restore(kind, value, traceback);
}

static void disarm(Block *block, int left) {
    check_fork(block->state);
    Slot *slot = block->slot;
    if (!slot) return;
    block->slot = NULL;
    store(slot->words + DEADLINE, 0.0);
    if (left && slot->newer && slot->thread == this_thread && slot->task == 0.0)
        note_skipped(block->state, slot);

    if (slot->older) slot->older->newer = slot->newer;
    if (slot->newer) slot->newer->older = slot->older;
    else if (slot->thread) slot->thread->newest = slot->older;
    slot->thread = NULL;
    Key *key = slot->key;
    key->known ? put(&key->free, slot) : give_back(slot);
    release(key);
}

static int arm(Block *block, Slot *slot, Thread *thread, double task) {
    slot->key->users++;
    block->slot = slot;
    block->entered = 1;
    slot->thread = thread;
    slot->newer = NULL;
    if ((slot->older = thread->newest)) slot->older->newer = slot;
    thread->newest = slot;
    if (slot->task != task) store(slot->words + TASK, slot->task = task);
    store(slot->words + ENTRY, slot->entry += 1.0);
    if (set_deadline(block) == 0) return 0;
    disarm(block, 0);
    block->entered = 0;
    return -1;
}

/* ---- blocks */

static PyObject *new_block(State *state, double after, PyObject *scope, int lasti,
                           PyObject *asked) {
    Block *block = PyObject_New(Block, state->block_type);
    if (!block) return NULL;
    Py_hash_t hash = ((Py_hash_t)((uintptr_t)scope >> 6)) ^ (lasti >> 1);
    if (lasti < 0) hash = PyObject_Hash(scope);
    block->what = (What){after, Py_NewRef(scope), Py_XNewRef(asked), lasti, hash};
    block->state = state;
    block->slot = NULL;
    block->other = NULL;
    block->entered = block->awaited = 0;
    return (PyObject *)block;
}

static PyObject *block_of(PyObject *module, PyObject *const *args, Py_ssize_t n) {
    if (n != 4) return PyErr_Format(PyExc_TypeError, "block takes four arguments");
    double after = PyFloat_AsDouble(args[0]);
    long lasti = PyLong_AsLong(args[2]);
    if (PyErr_Occurred()) return NULL;
    PyObject *asked = args[3] == Py_None ? NULL : args[3];
    return new_block(state_of(module), after, args[1], (int)lasti, asked);
}
/* Have Python look at the arguments of `expires`. */
static PyObject *declare(State *state, PyObject *const *args, Py_ssize_t n, PyObject *names) {
    PyObject *function = PyObject_GetAttrString(state->hooks, "declare"), *result = NULL;
    PyObject *all = PyTuple_New(n), *named = PyDict_New();
    for (Py_ssize_t i = 0; all && i < n; i++) PyTuple_SetItem(all, i, Py_NewRef(args[i]));
    for (Py_ssize_t i = 0; named && names && i < PyTuple_Size(names); i++)
        if (PyDict_SetItem(named, PyTuple_GetItem(names, i), args[n + i]) < 0) Py_CLEAR(named);
    if (function && all && named) result = PyObject_Call(function, all, named);
    Py_XDECREF(function);
    Py_XDECREF(all);
    Py_XDECREF(named);
    return result;
}
/* Whatever is not plain, or wrong, goes to `declare`. */
static PyObject *expires(PyObject *module, PyObject *const *args, Py_ssize_t n, PyObject *names) {
    State *state = state_of(module);
    PyObject *after = n > 0 ? args[0] : NULL, *scope = n > 1 ? args[1] : NULL;
    Py_ssize_t named = names ? PyTuple_Size(names) : 0;
    int is_plain = n + named <= 2;
    for (Py_ssize_t i = 0; is_plain && i < named; i++) {
        PyObject *name = PyTuple_GetItem(names, i);
        PyObject **value = name == state->after_name ? &after : &scope;
        is_plain = !*value && (value == &after || name == state->scope_name);
        *value = args[n + i];
    }
    if (scope == Py_None) scope = NULL;
    double seconds = 0.0;
    if (is_plain && after && (PyFloat_CheckExact(after) || PyLong_CheckExact(after)))
        seconds = PyFloat_AsDouble(after);
    is_plain = seconds > 0.0 && seconds < INFINITY &&
               (!scope || (PyUnicode_CheckExact(scope) && PyUnicode_GetLength(scope) > 0));
    PyFrameObject *frame = is_plain && !scope ? PyEval_GetFrame() : NULL;
    if (!is_plain || (!scope && !frame)) /* first, of an integer that is too large for a double: */
        return PyErr_Clear(), declare(state, args, n, names);
    if (scope) return new_block(state, seconds, scope, -1, NULL);
    PyObject *lasti = PyObject_GetAttr((PyObject *)frame, state->lasti_name);
    if (!lasti) return NULL;
    PyObject *code = (PyObject *)PyFrame_GetCode(frame);
    PyObject *block = new_block(state, seconds, code, (int)PyLong_AsLong(lasti), NULL);
    Py_DECREF(code);
    Py_DECREF(lasti);
    return block;
}
static void block_dealloc(Block *block) {
    PyTypeObject *type = Py_TYPE((PyObject *)block);
    Py_CLEAR(block->other); /* first: what ends with it may move deadlines */
    disarm(block, 0);
    Py_DECREF(block->what.scope);
    Py_XDECREF(block->what.asked);
    PyObject_Free(block);
    Py_DECREF((PyObject *)type);
}

static PyObject *block_enter(Block *block, PyObject *Py_UNUSED(none)) {
    State *state = block->state;
    if (block->entered) return PyObject_CallMethod(state->hooks, "refuse_again", NULL);
    if (state->ended) return Py_NewRef((PyObject *)block);
    check_fork(state);
    Thread *thread = thread_of(state);
    if (!thread) return NULL;
    double task = current_task(state, thread);
    Key *key = find_key(thread, &block->what);
    Slot *slot = NULL;
    if (key && key->quiet && (key->nests || !is_within(thread, &block->what)))
        slot = take(&key->free);
    if (slot) return arm(block, slot, thread, task) < 0 ? NULL : Py_NewRef((PyObject *)block);

    block->entered = 1;
    PyObject *other = PyObject_CallMethod(state->hooks, "enter", "O", block);
    if (other) {
        if (other != Py_None) block->other = Py_NewRef(other);
        Py_DECREF(other);
        return Py_NewRef((PyObject *)block);
    }
    disarm(block, 0);
    block->entered = 0;
    return NULL;
}
static PyObject *block_exit(Block *block, PyObject *const *args, Py_ssize_t n) {
    PyObject *other = block->other, *result = Py_NewRef(Py_None);
    if (other) {
        block->other = NULL;
        Py_DECREF(result);
        result = PyObject_CallMethod(other, "exit", "OOO", n > 0 ? args[0] : Py_None,
                                     n > 1 ? args[1] : Py_None, n > 2 ? args[2] : Py_None);
    }
    disarm(block, 1);
    Py_XDECREF(other);
    return result;
}
static PyObject *block_aenter(Block *block, PyObject *none) {
    PyObject *entered = block_enter(block, none);
    if (entered) block->awaited = 1;
    return entered;
}
static PyObject *block_aexit(Block *block, PyObject *const *args, Py_ssize_t n) {
    PyObject *result = block_exit(block, args, n);
    Py_XDECREF(result);
    block->awaited = 2;
    return result ? Py_NewRef((PyObject *)block) : NULL;
}
/* `async with` awaits what these return: the block itself, which is ready at once. */
static PyObject *block_await(Block *block) {
    if (block->awaited) return Py_NewRef((PyObject *)block);
    PyErr_SetString(PyExc_TypeError, "a block can't be awaited: use 'async with'");
    return NULL;
}
static PyObject *block_next(Block *block) {
    if (block->awaited == 1) PyErr_SetObject(PyExc_StopIteration, (PyObject *)block);
    block->awaited = 0;
    return NULL; /* without an error: what was awaited gives None */
}
static PyObject *block_renew(Block *block, PyObject *args, PyObject *named) {
    PyObject *after = Py_None;
    if ((named || PyTuple_Size(args)) &&
        !PyArg_ParseTupleAndKeywords(args, named, "|O:renew", (char *[]){"after", NULL}, &after))
        return NULL;
    check_fork(block->state);
    Slot *slot = block->slot;
    if (after != Py_None || !slot || block->other)
        return PyObject_CallMethod(block->state->hooks, "renew", "OO", block, after);
    Word *words = slot->words;
    if (load(words + RENEWED_ENTRY) != slot->entry) {
        store(words + ENTERED, load(words + DEADLINE) - block->what.after);
        store(words + RENEWED_ENTRY, slot->entry);
    }
    store(words + RENEWED_LIMIT, block->what.after);
    store(words + RAISED_ENTRY, 0.0);
    store(words + SKIPPED_ENTRY, 0.0);
    return set_deadline(block) < 0 ? NULL : Py_NewRef(Py_None);
}
static PyObject *get_place(Block *block, void *Py_UNUSED(closure)) {
    check_fork(block->state);
    Slot *slot = block->slot;
    if (!slot) Py_RETURN_NONE;
    Slots *slots = slot->key->slots;
    return Py_BuildValue("Ond", slots->memory.obj, (Py_ssize_t)(slot - slots->rows), slot->entry);
}

/* ---- slots */

static PyObject *new_slots(PyObject *module, PyObject *args) {
    State *state = state_of(module);
    PyObject *mapped, *ring;
    Py_ssize_t capacity;
    if (!PyArg_ParseTuple(args, "OOn:Slots", &mapped, &ring, &capacity)) return NULL;
    Slots *slots = PyObject_Calloc(1, sizeof *slots + (size_t)capacity * sizeof *slots->rows);
    if (!slots) return PyErr_NoMemory();
    PyObject_Init((PyObject *)slots, state->slots_type);
    slots->state = state, slots->capacity = capacity;
    slots->ring = Py_NewRef(ring);
    if (PyObject_GetBuffer(mapped, &slots->memory, PyBUF_WRITABLE) < 0)
        return Py_DECREF((PyObject *)slots), NULL;
    slots->words = slots->memory.buf;
    slots->next = state->pages;
    state->pages = slots;
    return (PyObject *)slots;
}
static void slots_dealloc(Slots *slots) {
    PyTypeObject *type = Py_TYPE((PyObject *)slots);
    Slots **at = &slots->state->pages; /* it isn't there where its making has failed */
    while (*at && *at != slots) at = &(*at)->next;
    if (*at) *at = slots->next;
    Py_XDECREF(slots->ring);
    if (slots->memory.obj) PyBuffer_Release(&slots->memory);
    PyObject_Free(slots);
    Py_DECREF((PyObject *)type);
}
/* Take one that no key has; NULL: none is left, even if all threads forget their keys. */
static Slot *free_slot(Slots *slots) {
    int is_full = slots->given_out >= slots->capacity;
    if (!slots->free && is_full) forget_keys(slots->state, NULL);
    if (slots->free || is_full) return take(&slots->free);
    Slot *slot = &slots->rows[slots->given_out];
    slot->words = slots->words + (HEADER_BYTES + slots->given_out++ * SLOT_BYTES) / 8;
    store(slots->words + SLOTS_IN_USE, (double)slots->given_out);
    return slot;
}
/* Give a key a slot, its details written; NULL without an error: none is left. */
static Slot *give(Key *key, PyObject *details) {
    PyObject *bytes = PyObject_CallNoArgs(details);
    char *text; Py_ssize_t size;
    if (!bytes || PyBytes_AsStringAndSize(bytes, &text, &size) < 0) return NULL;
    Slot *slot = size == DETAILS_BYTES ? free_slot(key->slots) : NULL;
    if (slot) {
        /* The new generation goes first: who reads the rest in between sees it change. */
        double before = floor(load(slot->words + ENTRY) / GENERATION);
        store(slot->words + ENTRY, slot->entry = fmod(before + 1.0, GENERATIONS) * GENERATION);
        memcpy((void *)(slot->words + LIMIT), text, DETAILS_BYTES);
        slot->task = 0.0;
        slot->key = key;
    }
    Py_DECREF(bytes);
    return slot;
}

static PyObject *slots_arm(Slots *slots, PyObject *args) {
    State *state = slots->state;
    Block *block;
    PyObject *details;
    double task;
    int quiet, nests;
    if (!PyArg_ParseTuple(args, "O!Odpp:arm", state->block_type, &block, &details, &task, &quiet,
                          &nests))
        return NULL;
    check_fork(state);
    if (slots->closed) Py_RETURN_FALSE;
    Thread *thread = thread_of(state);
    if (!thread) return NULL;
    Key *key = find_key(thread, &block->what);
    if (!key || key->slots != slots) {
        if (key || thread->keys >= MOST_KEYS) forget_keys(state, thread);
        key = new_key(thread, &block->what, slots);
        if (!key) return NULL;
    }
    key->quiet = quiet;
    key->nests = nests;
    key->users++;
    Slot *slot = key->free ? take(&key->free) : give(key, details);
    int failed = slot ? arm(block, slot, thread, task) < 0 : PyErr_Occurred() != NULL;
    release(key);
    return failed ? NULL : PyBool_FromLong(slot != NULL);
}

/* ---- the module */

static char expires_doc[4096] = "expires($module, /, after, scope=None, client=None, "
    "on_expiry=None, grace=None, signal=None, raises=None)\n--\n\n"; /* then `use` adds to it */
static PyObject *use(PyObject *module, PyObject *args) {
    const char *text;
    if (!PyArg_ParseTuple(args, "Oz:use", &state_of(module)->hooks, &text)) return NULL;
    Py_INCREF(args); /* and with them the hooks */
    if (text && !strstr(expires_doc, text)) strncat(expires_doc, text, 4095 - strlen(expires_doc));
    Py_RETURN_NONE;
}
static PyObject *ask_asyncio(PyObject *module, PyObject *args) {
    State *state = state_of(module); /* once */
    if (!PyArg_ParseTuple(args, "OO", &state->running_loop, &state->tasks)) return NULL;
    Py_INCREF(args); /* and with them what it holds */
    Py_RETURN_NONE;
}
static PyObject *forget_all_keys(PyObject *module, PyObject *Py_UNUSED(none)) {
    forget_keys(state_of(module), NULL);
    Py_RETURN_NONE;
}
static PyObject *forks(PyObject *module, PyObject *Py_UNUSED(none)) {
    check_fork(state_of(module));
    return PyLong_FromLong(state_of(module)->forks);
}
static PyObject *register_fence(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(none)) {
    /* MEMBARRIER_CMD_REGISTER_GLOBAL_EXPEDITED */
    return PyBool_FromLong(syscall(SYS_membarrier, 1 << 2, 0, 0) == 0);
}
static PyObject *end(PyObject *module, PyObject *Py_UNUSED(none)) {
    State *state = state_of(module);
    check_fork(state);
    state->ended = 1;
    for (Slots *slots = state->pages; slots; slots = slots->next)
        for (Py_ssize_t i = 0; i < slots->given_out; i++)
            if (!slots->rows[i].thread || slots->rows[i].thread != this_thread)
                store(slots->rows[i].words + DEADLINE, 0.0);
    Py_RETURN_NONE;
}

#define CALL(function) (PyCFunction)(void (*)(void))(function)
static PyMethodDef block_methods[] = {
    {"__enter__", CALL(block_enter), METH_NOARGS, NULL},
    {"__exit__", CALL(block_exit), METH_FASTCALL, NULL},
    {"__aenter__", CALL(block_aenter), METH_NOARGS, NULL},
    {"__aexit__", CALL(block_aexit), METH_FASTCALL, NULL},
    {"renew", CALL(block_renew), METH_VARARGS | METH_KEYWORDS,
     "renew($self, /, after=None)\n--\n\n"
     "Give the open block another interval from now on: a heartbeat.\n\nArgs:\n"
     "    after: seconds of this interval; by default the block's own.\n\nRaises:\n"
     "    HangwatchError: the block is not open.\n    UnsupportedError: its client can't do that.\n"
     "    ValueError, TypeError: `after` is not a positive number."},
    {0}};
static PyGetSetDef block_fields[] = {{"place", (getter)get_place, NULL, NULL, NULL}, {0}};
#define MEMBER(name, type, field) {name, type, offsetof(Block, field), READONLY, NULL}
static PyMemberDef block_members[] = {
    MEMBER("after", T_DOUBLE, what.after), MEMBER("scope", T_OBJECT, what.scope),
    MEMBER("lasti", T_INT, what.lasti), MEMBER("asked", T_OBJECT, what.asked),
    MEMBER("other", T_OBJECT, other), {0}};
static PyType_Slot block_slots[] = {
    {Py_tp_dealloc, block_dealloc}, {Py_tp_methods, block_methods}, {Py_tp_getset, block_fields},
    {Py_tp_members, block_members}, {Py_am_await, block_await}, {Py_tp_iter, block_await},
    {Py_tp_iternext, block_next}, {0}};
static PyType_Spec block_spec = {"hangwatch.Expiration", sizeof(Block), 0,
    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, block_slots};
static PyMethodDef slots_methods[] = {{"arm", CALL(slots_arm), METH_VARARGS, NULL}, {0}};
static PyMemberDef slots_members[] = {{"closed", T_INT, offsetof(Slots, closed), 0, NULL}, {0}};
static PyType_Slot slots_slots[] = {
    {Py_tp_dealloc, slots_dealloc}, {Py_tp_methods, slots_methods},
    {Py_tp_members, slots_members}, {0}};
static PyType_Spec slots_spec = {"hangwatch.worker._core.Slots", sizeof(Slots), 0,
    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, slots_slots};
static PyMethodDef functions[] = {
    {"expires", CALL(expires), METH_FASTCALL | METH_KEYWORDS, expires_doc},
    {"block", CALL(block_of), METH_FASTCALL, NULL}, {"Slots", new_slots, METH_VARARGS, NULL},
    {"use", use, METH_VARARGS, NULL}, {"ask_asyncio", ask_asyncio, METH_VARARGS, NULL},
    {"forget_keys", forget_all_keys, METH_NOARGS, NULL}, {"forks", forks, METH_NOARGS, NULL},
    {"register_fence", register_fence, METH_NOARGS, NULL}, {"end", end, METH_NOARGS, NULL}, {0}};

static int exec(PyObject *module) {
    /* Never freed: blocks may end after the module. */
    State *state = *(State **)PyModule_GetState(module) = calloc(1, sizeof *state);
    if (!state) return PyErr_NoMemory(), -1;
    state->token = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (state->token == MAP_FAILED || madvise((void *)state->token, 4096, MADV_WIPEONFORK) < 0)
        return PyErr_SetString(PyExc_ImportError, "Linux 4.14 can wipe a page on fork"), -1;
    *state->token = 1;
    state->block_type = (PyTypeObject *)PyType_FromSpec(&block_spec);
    state->slots_type = (PyTypeObject *)PyType_FromSpec(&slots_spec);
    if (!state->block_type || !state->slots_type ||
        !(state->lasti_name = PyUnicode_InternFromString("f_lasti")) ||
        !(state->after_name = PyUnicode_InternFromString("after")) ||
        !(state->scope_name = PyUnicode_InternFromString("scope")) ||
        !(state->loop_name = PyUnicode_InternFromString("__asyncio_running_event_loop__")) ||
        PyModule_AddIntConstant(module, "LAYOUT", LAYOUT) < 0)
        return -1;
    return PyModule_AddObjectRef(module, "Expiration", (PyObject *)state->block_type);
}
static PyModuleDef_Slot module_slots[] = {{Py_mod_exec, exec}, {0, NULL}};
static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, .m_name = "hangwatch.worker._core", .m_size = sizeof(State *),
    .m_methods = functions, .m_slots = module_slots};
PyMODINIT_FUNC PyInit__core(void) { return PyModuleDef_Init(&definition); }
