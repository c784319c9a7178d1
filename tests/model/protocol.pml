/*
 * The protocol between worker threads that arm timers and the watcher that visits their page.
 *
 * Names are the code's. Every step says which code it stands for; README.md says what is and
 * isn't covered, and check.py runs the variants. A variant is a set of switches (-D):
 *
 *   sizes     THREADS 1 or 2, PAGES 1 or 2 (with 2, thread t is alone in page t), ARMS: how often
 *             a thread enters a block, LAST: when the clock stops, DEATHS: how many watchers die
 *   worlds    NO_FENCE; SWEEP=period; BUDGET: visits may be refused; STOPPED: not replaced
 *   coarser   COARSE: no entry counters, and a thread's blocks have all the same limit (1 for
 *             thread 0, 2 for thread 1; SAME_LIMIT: 1 for both); ONE_STORE: ringing is quick
 *   breaks    all other switches, each one deliberate error, named by what is wrong
 *   REACH=n   to show that something happens: its place in the model fails an assertion
 */

#ifndef THREADS
#define THREADS 2
#endif
#ifndef PAGES
#define PAGES 1
#endif
#ifndef ARMS
#define ARMS 2
#endif
#ifndef LAST
#define LAST 4
#endif
#ifndef DEATHS
#define DEATHS 0
#endif
#ifdef SAME_LIMIT
#define LIMIT_OF(t) 1
#else
#define LIMIT_OF(t) (t + 1)
#endif
#ifndef REACH
#define REACH 0
#endif

#define FAR 15 /* visit.py: inf */
#define ALL ((1 << PAGES) - 1)
#define PAGE_OF(t) (PAGES == 2 -> t : 0)
#define INDEX_OF(t) (PAGES == 2 -> 0 : t) /* of the thread's slot in its page */

/* What must be possible in a model that means something; see check.py. */
#define REACHED(what) assert(REACH != what)
#define QUIET 1          /* an arming is quiet */
#define QUIET_UNARMED 2  /* ... by a promise that was made while the slot was not armed */
#define FOUND 3          /* a deadline is found due */
#define FOUND_QUIET 4    /* ... of a block that had not rung */
#define FOUND_LATER 5    /* ... of a successor's watch, in the last page */
#define TOLD_TWICE 6     /* both deadlines of one entry are found: the ring took that long */
#define SWEPT 7          /* a deadline is found that only the sweep could find */
#define FULL 8           /* a worker rings a watcher that has not heard the ring before */

/* CLOCK_MONOTONIC, which workers and watcher share. 0 is no time: it means "not armed". */
byte now = 1;

/* ---- memory, as page/layout.py lays it out ---- */

byte watch_until[PAGES];
#ifdef IN_USE_FROM_THE_START
byte slots_in_use[PAGES] = THREADS;
#else
byte slots_in_use[PAGES];
#endif
byte deadline[THREADS];
byte entry[THREADS];

/*
 * Total store order (x86): a store waits in its CPU's buffer, first in, first out, and reaches
 * memory at any later time. Loads are not delayed; the only word that anybody loads after
 * storing it, slots_in_use, is forwarded (see move_in). A full buffer stalls its CPU.
 */
mtype = { DEADLINE, ENTRY, SLOTS_IN_USE };
chan buffer[THREADS] = [3] of { mtype, byte };
chan watcher_buffer = [2] of { byte, byte };

/* worker/connection.py WatcherSocket: a datagram waits in the socket. A full socket is a ring
 * that nobody has heard yet, so one bit says it all. The keeper holds the socket's other end,
 * too (keep/keeper.py): a ring outlives the watcher. */
bit rung[PAGES];

/* ---- the watcher's own state, lost when it dies ---- */

byte next_visit[PAGES];     /* Watched.next_visit, in Watcher._heap */
bit busy[PAGES];            /* Watched.busy: an incident is under way */
bit muted[PAGES];           /* Watched.muted */
byte judged_entry[THREADS]; /* Watched.judged: of each slot what was judged last, until it ends */
byte judged_deadline[THREADS];
bit asleep;                 /* in Loop.sleep */
bit killed;                 /* SIGKILL is on its way: not one step more */
byte deaths;

/* ---- ghosts: nobody in the code sees these, only the property does ---- */

byte mine[THREADS];      /* what a thread stored last as its deadline, visible or not */
bit covered[THREADS];    /* it has looked, and is quiet or has rung: nothing more to come */
bit found[THREADS];      /* that very deadline was found due: a verdict */
#ifdef BUDGET
byte muted_until[PAGES];
#endif
#ifdef SWEEP
byte visible_at[THREADS]; /* when the deadline that stands in memory got there */
byte next_sweep = 1;      /* Watcher._next_sweep */
#endif
#if REACH > 0
bit quiet[THREADS];
bit told[THREADS]; /* a deadline of this entry was found before */
bit unarmed_at_visit[THREADS];
#define REACHING(note) note
#else
#define REACHING(note) skip
#endif

inline take_effect(t, word, value) {
    if
    :: word == DEADLINE ->
        deadline[t] = value;
#ifdef SWEEP
        visible_at[t] = (value > 0 -> now : 0);
#endif
        if
        :: value == 0 -> judged_entry[t] = 0; judged_deadline[t] = 0 /* Watched.forget_ended */
        :: else
        fi
    :: word == ENTRY -> entry[t] = value
    :: word == SLOTS_IN_USE -> slots_in_use[PAGE_OF(t)] = value
    fi;
    word = 0; value = 0
}

inline drain(t, word, value) {
    do
    :: nempty(buffer[t]) -> buffer[t] ? word, value; take_effect(t, word, value)
    :: empty(buffer[t]) -> break
    od
}

/* The hardware: store buffers drain when they like. */
active proctype cpus() {
    mtype word; byte value, page;
end:
    do
    :: d_step { nempty(buffer[0]) -> buffer[0] ? word, value; take_effect(0, word, value) }
#if THREADS == 2
    :: d_step { nempty(buffer[1]) -> buffer[1] ? word, value; take_effect(1, word, value) }
#endif
    :: d_step {
           nempty(watcher_buffer) -> watcher_buffer ? page, value;
           watch_until[page] = value; page = 0; value = 0
       }
    od
}

/* ---- the worker's half: arming, worker/core.py and worker/_core.c ---- */

/* The property's own book-keeping, in the same step as the store of a deadline. */
inline note_deadline(t, until) {
    if
    :: mine[t] != until -> found[t] = 0
    :: else
    fi;
    mine[t] = until
}

/* worker/client.py ring, worker/connection.py WatcherSocket.ring: send(2) takes the socket's
 * lock, a locked instruction, so the stores before it are visible to who hears the ring. It
 * never waits: a full socket (EAGAIN) is success. */
inline ring(t) {
    d_step {
        drain(t, word, value);
        if
        :: rung[PAGE_OF(t)] -> REACHED(FULL)
        :: else
        fi;
        rung[PAGE_OF(t)] = 1;
        covered[t] = 1
    }
}

/* worker/core.py Slots.arm, worker/_core.c move_in: a slot's first use. */
inline move_in(t) {
#ifdef IN_USE_FROM_THE_START
    skip /* core.py Slots: without a GIL, all count as used */
#else
#ifdef NO_GIL
    /* Look and store are two steps, and the other thread's store may still be on its way. */
    if
    :: slots_in_use[PAGE_OF(t)] <= INDEX_OF(t) -> buffer[t] ! SLOTS_IN_USE, INDEX_OF(t) + 1
    :: else
    fi
#else
    /* "No calls": the GIL makes it one step, and handing the GIL over drains the buffer. */
    atomic {
#if THREADS == 2 && PAGES == 1
        empty(buffer[1 - t]);
#endif
        if
        :: slots_in_use[PAGE_OF(t)] <= INDEX_OF(t) && times == 1 ->
            buffer[t] ! SLOTS_IN_USE, INDEX_OF(t) + 1
        :: else
        fi
    }
#endif
#endif
}

proctype thread(byte t) {
    mtype word; byte value;
    byte times, clock, length, first, seen;
    do
    :: times < ARMS ->
        times++;
#ifndef SLOTS_IN_USE_AFTER_ARMING
        move_in(t);
#endif
#ifdef LOOK_BEFORE_STORE
        seen = watch_until[PAGE_OF(t)];
#endif
#ifndef COARSE
        buffer[t] ! ENTRY, times; /* slot.entry = words[at + ENTRY] = slot.entry + 1.0 */
#endif
        /* now = monotonic(). Another limit than last time is another block that was given the
         * slot: core.py Slots.arm, _core.c move_in. */
        atomic {
            clock = now;
#ifdef COARSE
            first = clock + LIMIT_OF(t)
#else
            if
            :: first = clock + 1
            :: first = clock + 2
            fi
#endif
        };
        /* words[at] = deadline = now + slot.limit */
        atomic { buffer[t] ! DEADLINE, first; note_deadline(t, first) };
        /* if now < words[WATCH_UNTIL] <= deadline: one load, and what follows from it */
        atomic {
#ifdef LOOK_BEFORE_STORE
            skip;
#else
            seen = watch_until[PAGE_OF(t)];
#endif
            if
#ifdef QUIET_WITHOUT_PROMISE
            :: seen <= first ->
#else
            :: clock < seen && seen <= first ->
#endif
                REACHED(QUIET);
                REACHING(quiet[t] = 1);
                REACHING(assert(!(REACH == QUIET_UNARMED && unarmed_at_visit[t])));
                seen = FAR; covered[t] = 1 /* return self */
            :: else -> seen = 0
            fi
        };
        if
        :: seen == FAR -> d_step { clock = 0; first = 0; seen = 0 }
        :: seen == 0 ->
            ring(t); /* core.py Slots.ring, _core.c ring */
#ifndef ONE_STORE
            /* It may have connected first, which takes long.
             * words[slot.at] = monotonic() + slot.limit */
#ifdef COARSE
            atomic {
                length = first - clock; clock = now;
#else
            d_step {
                length = first - clock; clock = now;
#ifdef CLOCK_BEFORE_STORE
                seen = now
#endif
            };
            atomic {
#endif
                buffer[t] ! DEADLINE, clock + length;
                note_deadline(t, clock + length);
#ifndef NO_SECOND_RING
                covered[t] = 0;
#endif
                clock = 0; length = 0
            };
#ifndef NO_SECOND_RING
            /* The first deadline may have been found due, and then the watcher reckons
             * with no other one: if monotonic() >= deadline: self._ring() */
#ifdef CLOCK_BEFORE_STORE
            if
            :: seen >= first -> ring(t)
            :: seen < first -> covered[t] = 1
            fi;
#else
            if
            :: now >= first -> ring(t)
            :: now < first -> covered[t] = 1
            fi;
#endif
#endif
#endif
            d_step { clock = 0; first = 0; seen = 0 }
        fi;
#ifdef SLOTS_IN_USE_AFTER_ARMING
        move_in(t);
#endif
        /* Inside the block: it hangs for ever, or is left. */
        if
        :: break
        :: atomic {
               buffer[t] ! DEADLINE, 0; /* it is left, or its object ends */
               covered[t] = 0; found[t] = 0; mine[t] = 0;
               REACHING(quiet[t] = 0; told[t] = 0)
           }
        fi
    :: times == ARMS -> break
    od
}

/* ---- the watcher's half ---- */

#define IS_JUDGED(t) (judged_entry[t] == seen_entry[t] && JUDGED_DEADLINE(t))
#ifdef JUDGED_BY_ENTRY
#define JUDGED_DEADLINE(t) true
#else
#define JUDGED_DEADLINE(t) (judged_deadline[t] == seen_deadline[t])
#endif

/* page/view.py View.armed: deadline, then entry, of each slot in use. */
inline read_slot(t) {
    if
    :: PAGE_OF(t) == p && slots_in_use[p] > INDEX_OF(t) ->
        seen_deadline[t] = deadline[t];
#ifndef COARSE
        if
        :: seen_deadline[t] > 0 -> seen_entry[t] = entry[t]
        :: else
        fi
#endif
        skip
    :: else
    fi
}

/* visit.py: what one slot means for `due` and `again`, reckoned after the scan. */
inline reckon(t) {
    if
    :: PAGE_OF(t) == p ->
        REACHING(unarmed_at_visit[t] = (seen_deadline[t] == 0));
        if
        :: seen_deadline[t] > 0 && IS_JUDGED(t)
        :: seen_deadline[t] > 0 && !IS_JUDGED(t) ->
            if
            :: seen_deadline[t] <= clock -> due = due | (1 << t)
            :: seen_deadline[t] > clock ->
#ifdef PROMISE_FORGETS_A_SLOT
                if
                :: t == 0
                :: t != 0 -> again = (seen_deadline[t] < again -> seen_deadline[t] : again)
                fi
#else
                again = (seen_deadline[t] < again -> seen_deadline[t] : again)
#endif
            fi
        :: seen_deadline[t] == 0
        fi
    :: else
    fi
}

/* visit.py: an unarmed slot in use counts with now + limit if its entry has moved since the last
 * visit. Here it may count or not, with either limit: all that the counters could say, and more
 * (a limit that is being replaced), for `again` may always be earlier. */
inline reckon_unarmed(t) {
#ifndef PROMISE_WITHOUT_UNARMED
    if
    :: PAGE_OF(t) == p && slots_in_use[p] > INDEX_OF(t) && seen_deadline[t] == 0 ->
        if
#ifdef COARSE
        :: again = (clock + LIMIT_OF(t) < again -> clock + LIMIT_OF(t) : again)
#else
        :: again = (clock + 1 < again -> clock + 1 : again)
        :: again = (clock + 2 < again -> clock + 2 : again)
#endif
        :: true
        fi
    :: else
    fi
#else
    skip
#endif
}

/* watcher.py Watcher._open_incident, case.py case_of: judged, and looked at once more. */
inline open_incident(t) {
    atomic {
#ifdef JUDGED_AT_ONCE
        judged_entry[t] = seen_entry[t];
        judged_deadline[t] = seen_deadline[t];
#endif
        if
        :: deadline[t] == seen_deadline[t] && entry[t] == seen_entry[t] ->
            judged_entry[t] = seen_entry[t];
            judged_deadline[t] = seen_deadline[t];
            /* One incident at a time: at its end Watcher._resume_incidents visits again. */
            busy[p] = 1;
            if
            :: mine[t] == seen_deadline[t] ->
                REACHED(FOUND);
                REACHING(assert(!(REACH == FOUND_QUIET && quiet[t])));
                REACHING(assert(!(REACH == TOLD_TWICE && told[t])));
                REACHING(told[t] = 1);
                assert(!(REACH == FOUND_LATER && deaths > 0 && p == PAGES - 1));
#ifdef SWEEP
                assert(!(REACH == SWEPT && swept && next_visit[p] > now));
#endif
                found[t] = 1
            :: else
            fi
        :: else -> /* it has ended meanwhile, or its deadline is another one: visit again */
#ifndef ENDED_MEANWHILE_IS_ALL
            again = 0;
#endif
            skip
        fi
    }
}

active proctype watcher() {
    mtype word; byte value;
    byte p, clock, again, due, todo;
    byte seen_deadline[THREADS];
    byte seen_entry[THREADS];
    bit swept;

start:
    {
        /* watcher.py take_over: a successor visits every page before it is ready. */
        d_step {
            todo = ALL;
#if PAGES == 2
#ifdef SUCCESSOR_MISSES_A_PAGE
            if
            :: deaths > 0 -> todo = 1; next_visit[1] = FAR
            :: else
            fi;
#endif
#endif
#ifdef SUCCESSOR_SLEEPS
            if
            :: deaths > 0 -> todo = 0; next_visit[0] = FAR; asleep = 1
            :: else
            fi;
#endif
#ifdef SUCCESSOR_TRUSTS_THE_PROMISE
            if
            :: deaths > 0 -> todo = 0; next_visit[0] = watch_until[0]; asleep = 1
            :: else
            fi;
#endif
            skip
        }
        do
        :: todo != 0 ->
            d_step {
                if
                :: todo & 1 -> p = 0; todo = todo & 2
                :: else -> p = 1; todo = 0
                fi
            };
#ifdef BUDGET
            if
            :: true -> /* watcher.py Watcher._visit: the budget does not allow it now */
                d_step {
                    muted[p] = 1; muted_until[p] = now + 1; next_visit[p] = now + 1;
                    asleep = 1
                };
                goto visited
            :: true
            fi;
#ifndef MUTED_FOR_EVER
            /* Whoever visits, a muted page is heard again. */
            muted[p] = 0;
#endif
#endif
            /* visit.py visit() */
#ifndef NO_ZERO
            watcher_buffer ! p, 0; /* reader.promise(0.0) */
#endif
#ifndef NO_FENCE
            /* fence(): membarrier(2), GLOBAL_EXPEDITED, is a full barrier here and on every
             * CPU that runs a registered worker. */
            d_step {
                do
                :: nempty(watcher_buffer) ->
                    watcher_buffer ? value, again; watch_until[value] = again
                :: empty(watcher_buffer) -> break
                od;
                value = 0; again = 0;
                drain(0, word, value);
#if THREADS == 2
                drain(1, word, value)
#endif
            };
#endif
            /* armed = reader.armed() */
            read_slot(0);
#if THREADS == 2
            read_slot(1);
#endif
            atomic { /* now = clock() and what follows from it */
                clock = now;
                again = FAR;
                reckon(0);
                reckon_unarmed(0);
#if THREADS == 2
                reckon(1);
                reckon_unarmed(1);
#endif
                clock = 0;
                watcher_buffer ! p, again /* reader.promise(again); visible when it likes */
            };
            /* watcher.py Watcher._visit: found.due, one incident at a time a worker */
            if
            :: due & 1 && !busy[p] -> open_incident(0)
#if THREADS == 2
            :: due & 2 && !busy[p] -> open_incident(1)
#endif
            :: due == 0 || busy[p]
            fi;
#ifdef RING_HEARD_AFTER_VISIT
            rung[p] = 0;
#endif
            d_step {
                next_visit[p] = again; /* Watcher._schedule */
                again = 0; due = 0;
                seen_deadline[0] = 0; seen_entry[0] = 0;
#if THREADS == 2
                seen_deadline[1] = 0; seen_entry[1] = 0;
#endif
                if
                :: todo == 0 -> p = 0; swept = 0; asleep = 1
                :: else
                fi
            };
visited:
            skip
        :: todo == 0 ->
            /* Watcher.run: Loop.sleep until _next_wake, or until a descriptor has news. */
end_asleep:
            atomic {
                if
                :: rung[0] && !muted[0] -> /* Watcher._rung reads the rings, then visits */
#ifndef RING_HEARD_AFTER_VISIT
                    rung[0] = 0;
#endif
                    todo = 1
                :: next_visit[0] <= now -> /* Watcher._visit_due */
#ifdef MUTED_FOR_EVER
                    muted[0] = 0;
#endif
                    todo = 1
                :: busy[0] -> busy[0] = 0; todo = 1 /* Watcher._resume_incidents: it is over */
#if PAGES == 2
                :: rung[1] -> rung[1] = 0; todo = 2
                :: next_visit[1] <= now -> todo = 2
                :: busy[1] -> busy[1] = 0; todo = 2
#endif
#if defined(SWEEP) && !defined(NO_SWEEP)
                :: now >= next_sweep -> /* Watcher._tick */
                    next_sweep = now + SWEEP; swept = 1; todo = ALL
#endif
                fi;
                asleep = 0
            }
        od
    } unless { killed }
    /* Dead. Stores that it had made reach memory, those that it had not are never made. All else
     * that it knew is gone, but for what Watcher._resume_incidents had told the keeper
     * (takeover.py state_of: judged); here it is all or nothing. */
    asleep = 0;
#ifdef STOPPED
end_stopped:
    false;
#endif
    empty(watcher_buffer); /* keep/keeper.py forks once it has seen the end */
    atomic {
        d_step {
            killed = 0;
            p = 0; clock = 0; again = 0; due = 0; swept = 0; value = 0;
            next_visit[0] = 0; busy[0] = 0; muted[0] = 0;
            seen_deadline[0] = 0; seen_entry[0] = 0;
#if THREADS == 2
            seen_deadline[1] = 0; seen_entry[1] = 0;
#endif
#if PAGES == 2
            next_visit[1] = 0; busy[1] = 0
#endif
        };
        if
        :: true -> judged_entry[0] = 0; judged_deadline[0] = 0;
#if THREADS == 2
            judged_entry[1] = 0; judged_deadline[1] = 0
#endif
        :: true
        fi
    };
    goto start
}

#if DEATHS > 0
/* SIGKILL, at any step of the watcher. With STOPPED it is SIGSTOP, and nobody replaces it. */
active proctype killer() {
end:
    do
    :: d_step { deaths < DEATHS && !killed -> deaths++; killed = 1 }
    od
}
#endif

/* ---- the property ---- */

#ifndef SWEEP

/* Time passes between any two steps of anybody: whoever is preempted, stopped or starved. */
active proctype time() {
    do
    :: d_step { now < LAST -> now++ }
    :: now == LAST -> break
    od
}

/*
 * No missed deadline: while the watcher sleeps, and nothing that has happened will wake it, it
 * will wake by itself in time for every deadline of a thread that has looked. `mine` is what the
 * thread stored, visible or not; a thread between its store and its look may yet ring.
 *
 * That is enough. At its deadline the watcher is then awake, or due, or rung, or (stopped, dead)
 * will go through a visit when it runs again; and whenever it sleeps anew the same holds, so the
 * deadline has been found by then, or the watcher is due at once and does not sleep at all. How
 * late it comes is a matter of how soon it runs, not of the protocol.
 */
#ifdef BUDGET /* who rings for ever is visited once its budget has filled up a little */
#define WILL_COME_BY(p, when) (next_visit[p] <= when || next_visit[p] <= muted_until[p])
#else
#define WILL_COME_BY(p, when) (next_visit[p] <= when)
#endif
#define MISSED(t) (asleep && !killed && covered[t] && mine[t] > 0 && !found[t] \
    && !(rung[PAGE_OF(t)] && !muted[PAGE_OF(t)]) && !busy[PAGE_OF(t)] \
    && !WILL_COME_BY(PAGE_OF(t), mine[t]))

active proctype no_missed_deadline() {
end:
    /* watcher/visit.py and arming together */
    if
    :: MISSED(0) -> assert(!MISSED(0))
#if THREADS == 2
    :: MISSED(1) -> assert(!MISSED(1))
#endif
    fi
}

#else

/*
 * The sweep's bound, without the fence. Here the watcher runs as soon as it has something to do
 * (else its own delay comes on top), so time passes only while it sleeps for good reason.
 */
#ifdef NO_SWEEP
#define SWEEP_DUE false
#else
#define SWEEP_DUE (now >= next_sweep)
#endif
#define AWAKE (!asleep || killed || rung[0] || busy[0] || next_visit[0] <= now \
    || SWEEP_DUE)

/* watcher.py Watcher._tick: found at the latest at the deadline, or one sweep after the store
 * became visible, whichever is later; so within one sweep of the later of the two. */
#ifndef BOUND
#define BOUND SWEEP
#endif
#define LATER_OF(a, b) (a > b -> a : b)
#define OVERDUE(t) (mine[t] > 0 && len(buffer[t]) == 0 && !found[t] \
    && LATER_OF(mine[t], visible_at[t] + BOUND) <= now)

active proctype time() {
    do
    :: d_step { now < LAST && !AWAKE ->
           assert(!OVERDUE(0));
#if THREADS == 2
           assert(!OVERDUE(1));
#endif
           now++
       }
    :: now == LAST -> break
    od
}

#endif

init {
    atomic {
        run thread(0);
#if THREADS == 2
        run thread(1)
#endif
    }
}
