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
enum { LAYOUT = 3, SLOT_BYTES = 320, WATCH_UNTIL = 2, SLOTS_IN_USE = 3 };
enum { DEADLINE = 0, ENTRY = 2, LIMIT = 3, IDENT = 4, TASK = 7, SKIPPED_ENTRY = 8,
       RENEWED_ENTRY = 10, ENTERED = 11, RENEWED_LIMIT = 12, RAISED_ENTRY = 13 };
#define GENERATION 4294967296.0     /* 2**32 */
#define GENERATIONS 1048576.0       /* 2**20 */
#define CAPSULE "hangwatch.thread"
enum { DETAILS_BYTES = SLOT_BYTES - LIMIT * 8, BUCKETS = 64, MOST_KEYS = 64, MOST_SPARE = 64 };

typedef _Atomic double Word;
typedef struct State State; typedef struct Slots Slots; typedef struct Thread Thread;
/* One place of a page. */
typedef struct Slot {
    Word *words;
    double entry, task, order;  /* order: of the thread's blocks, by their time of entry */
    struct Key *key;            /* whose block it is, or was last */
    struct Slot *next;          /* in a list of free ones */
    struct Slot *older, *newer; /* in the list of the thread's open ones */
} Slot;
/* What a thread enters again and again: a scope with its limit and policy. */
typedef struct Key {
    PyObject *scope, *asked; /* as of a block */
    Py_hash_t hash;
    int lasti, quiet; /* quiet: Python need not be asked */
    double after, limit;
    long epoch, open;
    Slots *slots; Slot *free;
    Thread *thread; struct Key *next;
} Key;
struct Thread {
    Key *table[BUCKETS];
    State *state;
    Slot *newest;
    PyObject *kept, *loop; /* see task_of_thread */
    double order;
    long keys, epoch, dead;
    Thread *next;
};
/* All slots of one page: core.Slots. */
struct Slots {
    PyObject_HEAD
    State *state;
    Py_buffer memory;
    Word *words;
    PyObject *ring;
    Slot *rows, *free;
    Py_ssize_t first, capacity, given_out;
    int closed;
    Slots *next;
};
/* core.Expiration. */
typedef struct {
    PyObject_HEAD
    State *state;
    Slot *slot;      /* while it is open, if it has one */
    PyObject *other; /* what else begins and ends with it */
    PyObject *scope; /* str, or the code that called expires */
    PyObject *asked; /* what else the caller chose, or NULL */
    Py_hash_t hash;
    int lasti; /* of that call; -1 if the scope has a name */
    char entered, awaited; /* awaited by `async with` next: 1, being entered; 2, being left */
    double after;
} Block;
struct State {
    PyTypeObject *block_type, *slots_type;
    PyObject *hooks; /* what Python decides: core.Hooks */
    PyObject *lasti_name, *after_name, *scope_name, *loop_key, *running_loop, *tasks;
    Block *spare;
    long spares, epoch, forks, ended;
    volatile char *token; /* 1; the kernel makes it 0 in every forked child */
    Slots *all;
    Thread *threads;
};
static _Thread_local Thread *this_thread;
static inline double load(Word *word) { return atomic_load_explicit(word, memory_order_relaxed); }
static inline void store(Word *word, double value) {
    atomic_store_explicit(word, value, memory_order_release);
}
static inline double monotonic(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

/* The first look of a forked child, whoever forked it: the pages are its own from here on. */
static void __attribute__((noinline)) forget_parent(State *state) {
    for (Slots *slots = state->all; slots; slots = slots->next) {
        mmap(slots->memory.buf, (size_t)slots->memory.len, PROT_READ | PROT_WRITE,
             MAP_PRIVATE | MAP_FIXED | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        slots->closed = 1;
    }
    state->epoch++;
    state->forks++;
    *state->token = 1;
}
static inline State *state_of(PyObject *module) { return *(State **)PyModule_GetState(module); }
static inline void check_fork(State *state) {
    if (__builtin_expect(!*state->token, 0)) forget_parent(state);
}
/* ---- keys and threads */
static void give_back(Slots *slots, Slot *slot) {
    store(slot->words + IDENT, 0.0); /* the thread's name is nobody's from here on */
    slot->key = NULL; slot->next = slots->free;
    slots->free = slot;
}
/* Take from a thread its keys but those of open blocks; of one page, or of all. */
static Key *take_keys(Thread *thread, Slots *only, Key *taken) {
    for (int i = 0; i < BUCKETS; i++)
        for (Key **at = &thread->table[i], *key; (key = *at);) {
            if (key->open || (only && key->slots != only)) { at = &key->next; continue; }
            *at = key->next;
            key->next = taken; taken = key;
            thread->keys--;
            for (Slot *slot; (slot = key->free); give_back(key->slots, slot)) key->free = slot->next;
        }
    return taken;
}
/* Only after all else, for it may run code of others. */
static void free_keys(Key *taken) {
    for (Key *key; (key = taken); PyMem_Free(key)) {
        taken = key->next;
        Py_DECREF(key->scope); Py_XDECREF(key->asked); Py_DECREF((PyObject *)key->slots);
    }
}
static void drop_keys(Thread *thread, Slots *only) {
    Key *taken = take_keys(thread, only, NULL);
    if (thread->dead && !thread->keys) { /* its last block has ended */
        Thread **at = &thread->state->threads;
        while (*at != thread) at = &(*at)->next;
        *at = thread->next;
        PyMem_Free(thread);
    }
    free_keys(taken);
}
static void thread_ends(PyObject *capsule) {
    Thread *thread = PyCapsule_GetPointer(capsule, CAPSULE);
    if (this_thread == thread) this_thread = NULL;
    check_fork(thread->state);
    thread->dead = 1;
    Py_CLEAR(thread->kept);
    drop_keys(thread, NULL);
}
static Thread *find_thread(State *state) {
    PyObject *dict = PyThreadState_GetDict(), *name = (PyObject *)state->block_type;
    PyObject *capsule = dict ? PyDict_GetItem(dict, name) : NULL; /* this interpreter's, ours */
    if (capsule) return this_thread = PyCapsule_GetPointer(capsule, CAPSULE);
    Thread *thread = dict ? PyMem_Calloc(1, sizeof *thread) : NULL;
    if (!thread) return PyErr_NoMemory(), NULL;
    thread->state = state;
    thread->next = state->threads;
    state->threads = thread;
    capsule = PyCapsule_New(thread, CAPSULE, thread_ends);
    int failed = !capsule || PyDict_SetItem(dict, name, capsule) < 0;
    Py_XDECREF(capsule);
    return failed ? NULL : (this_thread = thread);
}
/* Whether two callers chose the same: policies are interned, so no code of theirs runs here. */
static int is_same(PyObject *asked, PyObject *other) {
    for (Py_ssize_t i = 0; i < PyTuple_Size(asked); i++)
        if (PyTuple_GetItem(asked, i) != PyTuple_GetItem(other, i)) return 0;
    return 1;
}
static Key *find_key(Thread *thread, Block *block, Slots *slots) {
    for (Key *key = thread->table[block->hash & (BUCKETS - 1)]; key; key = key->next) {
        if (key->hash != block->hash || key->lasti != block->lasti || key->after != block->after ||
            key->epoch != thread->state->epoch || !key->asked != !block->asked ||
            (slots ? key->slots != slots : !key->quiet))
            continue;
        if (key->scope != block->scope &&
            (key->lasti >= 0 || PyUnicode_Compare(key->scope, block->scope))) continue;
        if (key->asked != block->asked && !is_same(key->asked, block->asked)) continue;
        return key;
    }
    return NULL;
}
static Key *new_key(Thread *thread, Block *block, Slots *slots) {
    if (thread->keys >= MOST_KEYS) drop_keys(thread, NULL);
    Key *key = PyMem_Calloc(1, sizeof *key);
    if (!key) return PyErr_NoMemory(), NULL;
    Key **at = &thread->table[block->hash & (BUCKETS - 1)];
    *key = (Key){Py_NewRef(block->scope), Py_XNewRef(block->asked), block->hash, block->lasti,
                 .after = block->after, .epoch = thread->state->epoch, .thread = thread,
                 .slots = (Slots *)Py_NewRef((PyObject *)slots), .next = *at};
    *at = key;
    thread->keys++;
    return key;
}
static Slot *free_slot(Slots *slots) {
    Key *taken = NULL;
    if (!slots->free && slots->given_out >= slots->capacity)
        /* Those that other scopes keep for their next blocks. */
        for (Thread *thread = slots->state->threads; thread; thread = thread->next)
            taken = take_keys(thread, slots, taken);
    Slot *slot = slots->free;
    if (slot) slots->free = slot->next;
    else if (slots->given_out < slots->capacity) {
        slot = &slots->rows[slots->given_out];
        slot->words = slots->words + slots->first / 8 + slots->given_out++ * (SLOT_BYTES / 8);
        store(slots->words + SLOTS_IN_USE, (double)slots->given_out);
    }
    free_keys(taken);
    return slot;
}
/* ---- arming and disarming */
/* Which task of asyncio's runs, as core.py has it. To ask for the loop is a system call in
 * CPython 3.11, so up to 3.12 a thread asks once for what asyncio keeps in its dict. */
static double task_of_thread(State *state, Thread *thread) {
    if (!state->running_loop) return 0.0;
    PyObject *dict = PyThreadState_GetDict(), *kept = NULL, *loop, *task;
    if (Py_Version < 0x030D0000) {
        kept = dict ? PyDict_GetItemWithError(dict, state->loop_key) : NULL;
        if (!kept || kept == Py_None) { Py_CLEAR(thread->kept); PyErr_Clear(); return 0.0; }
    }
    if (!kept || kept != thread->kept) {
        if (!(loop = PyObject_CallNoArgs(state->running_loop))) { PyErr_Clear(); return 0.0; }
        Py_XDECREF(thread->kept);
        thread->kept = Py_XNewRef(kept);
        Py_DECREF(thread->loop = loop); /* `kept` holds it, or it runs */
    }
    if (thread->loop == Py_None) return 0.0;
    if (PyDict_CheckExact(state->tasks)) task = PyDict_GetItemWithError(state->tasks, thread->loop);
    else Py_XDECREF(task = PyObject_CallFunctionObjArgs(state->tasks, thread->loop, NULL));
    PyErr_Clear();
    return (double)(uintptr_t)(task ? task : Py_None); /* in a loop, but in no task */
}
/* Ask the watcher for a look; the slot may be gone afterwards. */
static int ring(Block *block, Slot *slot) {
    Slots *slots = slot->key->slots;
    double limit = slot->key->limit;
    PyObject *callback = Py_NewRef(slots->ring), *connected = PyObject_CallNoArgs(callback);
    if (connected == Py_True && block->slot == slot) {
        /* It connected first, which is not the block's time. */
        double deadline = load(slot->words + DEADLINE);
        store(slot->words + DEADLINE, monotonic() + limit);
        if (monotonic() >= deadline) {
            /* The first deadline may have been found overdue, and the other one not yet. */
            Py_DECREF(connected);
            connected = PyObject_CallNoArgs(callback);
        }
    }
    Py_XDECREF(connected);
    Py_DECREF(callback);
    if (!connected && block->state->ended) PyErr_Clear();
    return connected || block->state->ended ? 0 : -1;
}
static inline int is_quiet(Slots *slots, double now, double deadline) {
    atomic_signal_fence(memory_order_seq_cst); /* the watcher's membarrier(2) is the fence */
    double until = load(slots->words + WATCH_UNTIL);
    return (now < until && until <= deadline) || slots->closed;
}
static void disarm(Block *block, int left);
static inline int arm(Block *block, Slot *slot, double task) {
    Key *key = slot->key;
    Thread *thread = key->thread;
    key->open++;
    block->slot = slot;
    block->entered = 1;
    slot->order = ++thread->order;
    slot->newer = NULL;
    if ((slot->older = thread->newest)) slot->older->newer = slot;
    thread->newest = slot;
    if (slot->task != task) store(slot->words + TASK, slot->task = task);
    store(slot->words + ENTRY, slot->entry += 1.0);
    double now = monotonic(), deadline = now + key->limit;
    store(slot->words + DEADLINE, deadline);
    if (__builtin_expect(is_quiet(key->slots, now, deadline), 1)) return 0;
    if (ring(block, slot) == 0) return 0;
    disarm(block, 0);
    block->entered = 0;
    return -1;
}
/* What was entered later and is open still was skipped, if nothing switches within a thread. */
static void __attribute__((noinline)) note_skipped(State *state, Thread *thread, double order) {
    PyObject *kind, *value, *traceback;
    PyErr_Fetch(&kind, &value, &traceback);
    PyObject *switches = PyObject_CallMethod(state->hooks, "switches_within_a_thread", NULL);
    if (switches == Py_False && this_thread == thread)
        for (Slot *slot = thread->newest; slot && slot->order > order; slot = slot->older)
            if (slot->task == 0.0) store(slot->words + SKIPPED_ENTRY, slot->entry);
    Py_XDECREF(switches);
    PyErr_Clear();
    PyErr_Restore(kind, value, traceback);
}
static void disarm(Block *block, int left) {
    Slot *slot = block->slot;
    if (!slot) return;
    State *state = block->state;
    check_fork(state);
    block->slot = NULL;
    store(slot->words + DEADLINE, 0.0);
    Key *key = slot->key;
    Thread *thread = key->thread;
    int skipped = left && slot->newer && thread == this_thread && slot->task == 0.0;
    double order = slot->order;
    if (slot->older) slot->older->newer = slot->newer;
    if (slot->newer) slot->newer->older = slot->older;
    else thread->newest = slot->older;
    slot->next = key->free;
    key->free = slot;
    if (__builtin_expect(skipped, 0)) note_skipped(state, thread, order);
    if (--key->open == 0 && __builtin_expect(thread->dead || key->epoch != state->epoch, 0))
        drop_keys(thread, key->slots);
}
/* ---- blocks */
/* Raise the error that Python has for it. */
static PyObject *refuse(State *state, const char *name) {
    PyObject *error = PyObject_CallMethod(state->hooks, name, NULL);
    if (error) PyErr_SetObject((PyObject *)Py_TYPE(error), error);
    Py_XDECREF(error);
    return NULL;
}
static PyObject *new_block(State *state, double after, PyObject *scope, Py_hash_t hash, int lasti,
                           PyObject *asked) {
    Block *block = state->spare;
    if (block) {
        state->spare = (Block *)block->slot;
        state->spares--;
    } else if (!(block = PyObject_Malloc(sizeof *block))) return PyErr_NoMemory();
    PyObject_Init((PyObject *)block, state->block_type);
    block->state = state;
    block->slot = NULL; block->other = NULL;
    block->scope = Py_NewRef(scope);
    block->asked = asked == Py_None ? NULL : Py_XNewRef(asked);
    block->hash = hash; block->lasti = lasti; block->after = after;
    block->entered = block->awaited = 0;
    return (PyObject *)block;
}
#define PLACE_HASH(code, lasti) ((Py_hash_t)((uintptr_t)(code) >> 6) ^ ((lasti) >> 1))
/* Have Python look at the arguments of `expires`. */
static PyObject *declare(State *state, PyObject *const *args, Py_ssize_t n, PyObject *names) {
    PyObject *function = PyObject_GetAttrString(state->hooks, "declare"), *result = NULL;
    PyObject *all = PyTuple_New(n), *named = PyDict_New();
    for (Py_ssize_t i = 0; all && i < n; i++) PyTuple_SetItem(all, i, Py_NewRef(args[i]));
    for (Py_ssize_t i = 0; named && names && i < PyTuple_Size(names); i++)
        if (PyDict_SetItem(named, PyTuple_GetItem(names, i), args[n + i]) < 0) Py_CLEAR(named);
    if (function && all && named) result = PyObject_Call(function, all, named);
    Py_XDECREF(function); Py_XDECREF(all); Py_XDECREF(named);
    return result;
}
static PyObject *expires(PyObject *module, PyObject *const *args, Py_ssize_t n, PyObject *names) {
    State *state = state_of(module);
    PyObject *given[] = {NULL, NULL}; /* after, scope */
    Py_ssize_t named = names ? PyTuple_Size(names) : 0;
    if (n + named > 2) goto declare;
    for (Py_ssize_t i = 0; i < n + named; i++) {
        PyObject *name = i < n ? NULL : PyTuple_GetItem(names, i - n);
        Py_ssize_t at = !name ? i : name == state->after_name ? 0 : 1 + (name != state->scope_name);
        if (at > 1 || given[at]) goto declare;
        given[at] = args[i];
    }
    PyObject *after = given[0], *scope = given[1];
    if (!after || (!PyFloat_CheckExact(after) && !PyLong_CheckExact(after))) goto declare;
    double seconds = PyFloat_AsDouble(after);
    if (!(seconds > 0.0 && seconds < INFINITY)) { PyErr_Clear(); goto declare; }
    if (scope && scope != Py_None) {
        if (!PyUnicode_CheckExact(scope) || !PyUnicode_GetLength(scope)) goto declare;
        return new_block(state, seconds, scope, PyObject_Hash(scope), -1, NULL);
    }
    PyFrameObject *frame = PyEval_GetFrame();
    if (!frame) goto declare;
    PyObject *at = PyObject_GetAttr((PyObject *)frame, state->lasti_name);
    if (!at) return NULL;
    int lasti = (int)PyLong_AsLong(at);
    Py_DECREF(at);
    PyObject *code = (PyObject *)PyFrame_GetCode(frame);
    PyObject *block = new_block(state, seconds, code, PLACE_HASH(code, lasti), lasti, NULL);
    Py_DECREF(code);
    return block;
declare: /* whatever is not plain, or wrong */
    return declare(state, args, n, names);
}
static PyObject *block_of(PyObject *module, PyObject *args) {
    double after;
    PyObject *scope, *asked;
    int lasti;
    if (!PyArg_ParseTuple(args, "dOiO:block", &after, &scope, &lasti, &asked)) return NULL;
    Py_hash_t hash = lasti < 0 ? PyObject_Hash(scope) : PLACE_HASH(scope, lasti);
    return new_block(state_of(module), after, scope, hash, lasti, asked);
}
static void block_dealloc(PyObject *self) {
    Block *block = (Block *)self;
    State *state = block->state;
    PyTypeObject *type = Py_TYPE(self);
    Py_CLEAR(block->other); /* first: what ends with it may move deadlines */
    disarm(block, 0);
    Py_DECREF(block->scope);
    Py_XDECREF(block->asked);
    if (state->spares++ < MOST_SPARE) {
        block->slot = (Slot *)state->spare;
        state->spare = block;
    } else { state->spares--; PyObject_Free(block); }
    Py_DECREF((PyObject *)type);
}
static PyObject *block_enter(PyObject *self, PyObject *Py_UNUSED(none)) {
    Block *block = (Block *)self;
    State *state = block->state;
    if (block->entered) return refuse(state, "entered");
    check_fork(state);
    Thread *thread = this_thread;
    if (__builtin_expect(thread && thread->state == state, 1)) {
        double task = task_of_thread(state, thread);
        Key *key = find_key(thread, block, NULL);
        Slot *slot = key ? key->free : NULL;
        if (__builtin_expect(slot != NULL, 1)) {
            key->free = slot->next;
            return arm(block, slot, task) < 0 ? NULL : Py_NewRef(self);
        }
    }
    block->entered = 1;
    if (state->ended) return Py_NewRef(self);
    PyObject *other = PyObject_CallMethod(state->hooks, "enter", "O", self);
    if (!other) { disarm(block, 0); block->entered = 0; return NULL; }
    if (other == Py_None) Py_DECREF(other);
    else block->other = other;
    return Py_NewRef(self);
}
static PyObject *block_exit(PyObject *self, PyObject *const *args, Py_ssize_t n) {
    Block *block = (Block *)self;
    PyObject *other = block->other, *result = Py_NewRef(Py_None);
    PyObject *given[] = {result, result, result};
    if (__builtin_expect(other != NULL, 0)) {
        memcpy(given, args, (size_t)(n < 3 ? n : 3) * sizeof *given);
        block->other = NULL;
        Py_DECREF(result);
        result = PyObject_CallMethod(other, "exit", "OOO", given[0], given[1], given[2]);
    }
    disarm(block, 1);
    Py_XDECREF(other);
    return result;
}
static PyObject *block_aenter(PyObject *self, PyObject *none) {
    PyObject *entered = block_enter(self, none);
    if (entered) ((Block *)self)->awaited = 1;
    return entered;
}
static PyObject *block_aexit(PyObject *self, PyObject *const *args, Py_ssize_t n) {
    PyObject *result = block_exit(self, args, n);
    Py_XDECREF(result);
    ((Block *)self)->awaited = 2;
    return result ? Py_NewRef(self) : NULL;
}
/* `async with` awaits what these return: the block itself, which is ready at once. */
static PyObject *block_await(PyObject *self) {
    if (((Block *)self)->awaited) return Py_NewRef(self);
    PyErr_SetString(PyExc_TypeError, "a block can't be awaited: use 'async with'");
    return NULL;
}
static PySendResult block_send(PyObject *self, PyObject *Py_UNUSED(value), PyObject **result) {
    Block *block = (Block *)self;
    *result = Py_NewRef(block->awaited == 1 ? self : Py_None);
    block->awaited = 0;
    return PYGEN_RETURN;
}
static PyObject *block_next(PyObject *self) {
    PyObject *result;
    block_send(self, Py_None, &result);
    PyErr_SetObject(PyExc_StopIteration, result);
    Py_DECREF(result);
    return NULL;
}
/* ---- what the holder of an open block does */
static PyObject *block_renew(PyObject *self, PyObject *const *args, Py_ssize_t n, PyObject *names) {
    Block *block = (Block *)self;
    Slot *slot = block->slot;
    check_fork(block->state);
    if (n || names || !slot || block->other) {
        if (n + (names ? PyTuple_Size(names) : 0) > 1 ||
            (names && PyTuple_GetItem(names, 0) != block->state->after_name))
            return PyErr_Format(PyExc_TypeError, "renew takes one argument at most: after");
        return PyObject_CallMethod(block->state->hooks, "renew", "OO", self,
                                   n || names ? args[0] : Py_None);
    }
    Word *words = slot->words;
    double limit = slot->key->limit, now = monotonic(), deadline = now + limit;
    if (load(words + RENEWED_ENTRY) != slot->entry) {
        store(words + ENTERED, load(words + DEADLINE) - limit);
        store(words + RENEWED_ENTRY, slot->entry);
    }
    store(words + RENEWED_LIMIT, limit);
    store(words + RAISED_ENTRY, 0.0);
    store(words + SKIPPED_ENTRY, 0.0);
    store(words + DEADLINE, deadline);
    if (!is_quiet(slot->key->slots, now, deadline)) {
        PyObject *rung = PyObject_CallNoArgs(slot->key->slots->ring);
        if (!rung) return NULL;
        Py_DECREF(rung);
    }
    Py_RETURN_NONE;
}
static PyObject *block_again(PyObject *self, PyObject *Py_UNUSED(none)) {
    Block *b = (Block *)self;
    return new_block(b->state, b->after, b->scope, b->hash, b->lasti, b->asked);
}
static PyObject *get_place(PyObject *self, void *Py_UNUSED(closure)) {
    Slot *slot = ((Block *)self)->slot;
    check_fork(((Block *)self)->state);
    if (!slot) Py_RETURN_NONE;
    Slots *slots = slot->key->slots;
    return Py_BuildValue("Ond", slots->memory.obj, (Py_ssize_t)(slot - slots->rows), slot->entry);
}
/* ---- slots */
static PyObject *new_slots(PyObject *module, PyObject *args) {
    State *state = state_of(module);
    PyObject *memory, *callback;
    Py_ssize_t first, capacity;
    if (!PyArg_ParseTuple(args, "OOnn:Slots", &memory, &callback, &first, &capacity)) return NULL;
    Slots *slots = PyObject_Calloc(1, sizeof *slots);
    if (!slots) return PyErr_NoMemory();
    PyObject_Init((PyObject *)slots, state->slots_type);
    slots->state = state;
    slots->first = first;
    slots->capacity = capacity;
    if (PyObject_GetBuffer(memory, &slots->memory, PyBUF_WRITABLE) < 0) goto failed;
    if (!(slots->rows = calloc((size_t)capacity, sizeof *slots->rows))) goto failed;
    slots->words = slots->memory.buf;
    slots->ring = Py_NewRef(callback);
    slots->next = state->all;
    state->all = slots;
    return (PyObject *)slots;
failed:
    Py_DECREF((PyObject *)slots);
    return PyErr_Occurred() ? NULL : PyErr_NoMemory();
}
/* Give a key a slot, its details written; NULL without an error: none is left. */
static Slot *move_in(Key *key, PyObject *details) {
    PyObject *bytes = PyObject_CallNoArgs(details);
    char *text;
    Py_ssize_t size;
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
static PyObject *slots_arm(PyObject *self, PyObject *args) {
    Slots *slots = (Slots *)self;
    State *state = slots->state;
    PyObject *given, *details;
    double limit, task;
    int quiet;
    if (!PyArg_ParseTuple(args, "O!dOdp:arm", state->block_type, &given, &limit, &details, &task,
                          &quiet)) return NULL;
    Block *block = (Block *)given;
    if (block->slot) return refuse(state, "entered");
    check_fork(state);
    if (slots->closed) Py_RETURN_FALSE;
    Thread *thread = this_thread;
    if ((!thread || thread->state != state) && !(thread = find_thread(state))) return NULL;
    if (thread->epoch != state->epoch) drop_keys(thread, NULL);
    thread->epoch = state->epoch;
    Key *key = find_key(thread, block, slots);
    if (!key && !(key = new_key(thread, block, slots))) return NULL;
    key->limit = limit;
    key->quiet = quiet;
    Slot *slot = key->free;
    if (slot) key->free = slot->next;
    else {
        key->open++; /* until it is armed, nobody may drop the key */
        slot = move_in(key, details);
        key->open--;
        if (!slot) return PyErr_Occurred() ? NULL : Py_NewRef(Py_False);
    }
    if (arm(block, slot, task) < 0) return NULL;
    Py_RETURN_TRUE;
}
static void slots_dealloc(PyObject *self) {
    Slots *slots = (Slots *)self;
    PyTypeObject *type = Py_TYPE(self);
    Slots **at = &slots->state->all;
    while (*at && *at != slots) at = &(*at)->next;
    if (*at) *at = slots->next;
    Py_XDECREF(slots->ring);
    if (slots->memory.obj) PyBuffer_Release(&slots->memory);
    free(slots->rows);
    PyObject_Free(self);
    Py_DECREF((PyObject *)type);
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
static PyObject *forget_keys(PyObject *module, PyObject *Py_UNUSED(none)) {
    state_of(module)->epoch++;
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
    state->epoch++; /* so that no key is known any more */
    for (Thread *thread = state->threads; thread; thread = thread->next)
        for (Slot *slot = thread == this_thread ? NULL : thread->newest; slot; slot = slot->older)
            store(slot->words + DEADLINE, 0.0);
    Py_RETURN_NONE;
}
#define CALL(function) (PyCFunction)(void (*)(void))(function)
static PyMethodDef block_methods[] = {
    {"__enter__", block_enter, METH_NOARGS, NULL},
    {"__exit__", CALL(block_exit), METH_FASTCALL, NULL},
    {"__aenter__", block_aenter, METH_NOARGS, NULL},
    {"__aexit__", CALL(block_aexit), METH_FASTCALL, NULL},
    {"renew", CALL(block_renew), METH_FASTCALL | METH_KEYWORDS, NULL},
    {"again", block_again, METH_NOARGS, NULL}, {0}};
static PyGetSetDef block_fields[] = {{"place", get_place, NULL, NULL, NULL}, {0}};
#define MEMBER(name, type) {#name, type, offsetof(Block, name), READONLY, NULL}
static PyMemberDef block_members[] = {
    MEMBER(after, T_DOUBLE), MEMBER(scope, T_OBJECT), MEMBER(lasti, T_INT),
    MEMBER(asked, T_OBJECT), MEMBER(other, T_OBJECT), {0}};
static PyType_Slot block_slots[] = {
    {Py_tp_dealloc, block_dealloc}, {Py_tp_methods, block_methods}, {Py_tp_getset, block_fields},
    {Py_tp_members, block_members}, {Py_am_await, block_await}, {Py_am_send, block_send},
    {Py_tp_iter, block_await}, {Py_tp_iternext, block_next}, {0}};
static PyType_Spec block_spec = {"hangwatch.Expiration", sizeof(Block), 0,
    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, block_slots};
static PyMethodDef slots_methods[] = {{"arm", slots_arm, METH_VARARGS, NULL}, {0}};
static PyMemberDef slots_members[] = {{"closed", T_INT, offsetof(Slots, closed), 0, NULL}, {0}};
static PyType_Slot slots_slots[] = {
    {Py_tp_dealloc, slots_dealloc}, {Py_tp_methods, slots_methods},
    {Py_tp_members, slots_members}, {0}};
static PyType_Spec slots_spec = {"hangwatch.worker._core.Slots", sizeof(Slots), 0,
    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, slots_slots};
static PyMethodDef functions[] = {
    {"expires", CALL(expires), METH_FASTCALL | METH_KEYWORDS, expires_doc},
    {"block", block_of, METH_VARARGS, NULL}, {"Slots", new_slots, METH_VARARGS, NULL},
    {"use", use, METH_VARARGS, NULL}, {"ask_asyncio", ask_asyncio, METH_VARARGS, NULL},
    {"forget_keys", forget_keys, METH_NOARGS, NULL}, {"forks", forks, METH_NOARGS, NULL},
    {"register_fence", register_fence, METH_NOARGS, NULL}, {"end", end, METH_NOARGS, NULL}, {0}};
static int exec(PyObject *module) {
    /* Never freed: blocks may end after the module. */
    State *state = calloc(1, sizeof *state);
    if (!state) return PyErr_NoMemory(), -1;
    *(State **)PyModule_GetState(module) = state;
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
        !(state->loop_key = PyUnicode_InternFromString("__asyncio_running_event_loop__")) ||
        PyModule_AddIntConstant(module, "LAYOUT", LAYOUT) < 0) return -1;
    return PyModule_AddObjectRef(module, "Expiration", (PyObject *)state->block_type);
}
static PyModuleDef_Slot module_slots[] = {{Py_mod_exec, exec}, {0, NULL}};
static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, .m_name = "hangwatch.worker._core", .m_size = sizeof(State *),
    .m_methods = functions, .m_slots = module_slots};
PyMODINIT_FUNC PyInit__core(void) { return PyModuleDef_Init(&definition); }
