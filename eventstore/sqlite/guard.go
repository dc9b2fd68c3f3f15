package sqlite

import (
	"strings"
	"sync"
	"sync/atomic"

	"modernc.org/libc"
	sqlite3 "modernc.org/sqlite/lib"
)

// guard refuses, while it is on, what SQL of the user must not do: end the
// transaction it runs in, reach for other files, or change deed's own tables.
// It also learns how long the write-ahead log is.
type guard struct {
	id    uintptr
	on    atomic.Bool
	pages atomic.Int64 // in the write-ahead log after the last commit
}

// guards finds the guard for the id that SQLite hands back: it cannot keep a
// Go pointer.
var guards struct {
	sync.Mutex
	last uintptr
	byID map[uintptr]*guard
}

// install makes the connection ask the guard about every statement it
// prepares.
func (c *conn) install() *guard {
	guards.Lock()
	defer guards.Unlock()
	if guards.byID == nil {
		guards.byID = map[uintptr]*guard{}
	}
	guards.last++
	c.guard = &guard{id: guards.last}
	guards.byID[c.guard.id] = c.guard
	sqlite3.Xsqlite3_set_authorizer(c.tls, c.db, function(authorize), c.guard.id)
	sqlite3.Xsqlite3_wal_hook(c.tls, c.db, function(committed), c.guard.id)
	return c.guard
}

func guardOf(id uintptr) *guard {
	guards.Lock()
	defer guards.Unlock()
	return guards.byID[id]
}

// committed replaces SQLite's own checkpoints, whose errors it ignores.
func committed(_ *libc.TLS, id, _, _ uintptr, pages int32) int32 {
	if g := guardOf(id); g != nil {
		g.pages.Store(int64(pages))
	}
	return sqlite3.SQLITE_OK
}

func (g *guard) forget() {
	guards.Lock()
	defer guards.Unlock()
	delete(guards.byID, g.id)
}

// ownPrefix begins the names of deed's own tables.
const ownPrefix = "deed_"

func authorize(_ *libc.TLS, id uintptr, action int32, first, second, _, _ uintptr) int32 {
	g := guardOf(id)
	if g == nil || !g.on.Load() {
		return sqlite3.SQLITE_OK
	}
	table := first
	switch action {
	case sqlite3.SQLITE_TRANSACTION, sqlite3.SQLITE_SAVEPOINT, sqlite3.SQLITE_ATTACH, sqlite3.SQLITE_DETACH, sqlite3.SQLITE_PRAGMA:
		return sqlite3.SQLITE_DENY
	case sqlite3.SQLITE_INSERT, sqlite3.SQLITE_UPDATE, sqlite3.SQLITE_DELETE,
		sqlite3.SQLITE_CREATE_TABLE, sqlite3.SQLITE_CREATE_VIEW, sqlite3.SQLITE_DROP_TABLE, sqlite3.SQLITE_DROP_VIEW:
	case sqlite3.SQLITE_ALTER_TABLE, sqlite3.SQLITE_CREATE_INDEX, sqlite3.SQLITE_DROP_INDEX,
		sqlite3.SQLITE_CREATE_TRIGGER, sqlite3.SQLITE_DROP_TRIGGER:
		table = second
	default:
		return sqlite3.SQLITE_OK
	}
	if strings.HasPrefix(strings.ToLower(libc.GoString(table)), ownPrefix) {
		return sqlite3.SQLITE_DENY
	}
	return sqlite3.SQLITE_OK
}
