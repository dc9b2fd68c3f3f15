package sqlite

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"unsafe"

	"github.com/stretchr/testify/require"
	"modernc.org/libc"
	"modernc.org/libc/sys/types"
	sqlite3 "modernc.org/sqlite/lib"
)

// disk is a SQLite file system layer over the real one that records every
// write, truncation and sync, and can make them fail. Give its name to vfs().
type disk struct {
	name string
	real *sqlite3.Tsqlite3_vfs

	mu    sync.Mutex
	trace []operation
	// fail, when set, is asked before every operation; what it returns other than
	// SQLITE_OK is the operation's result.
	fail func(operation) int32
}

type operationKind uint8

const (
	opWrite operationKind = iota
	opTruncate
	opSync
	opSyncFailed
	opDelete
	opNote // of the test
)

// operation is one entry of the trace.
type operation struct {
	kind operationKind
	file string // base name
	at   int64  // of a write; the size of a truncation
	data []byte
	note any
}

// disks finds what C hands back as addresses.
var disks struct {
	sync.Mutex
	byVFS   map[uintptr]*disk
	files   map[uintptr]openFile
	methods map[uintptr]uintptr // the real table -> ours
}

type openFile struct {
	disk *disk
	name string
	real *sqlite3.Tsqlite3_io_methods
}

var diskCount atomic.Int64

func vfs(name string) Option {
	return func(s *settings) error { s.vfs = name; return nil }
}

// newDisk registers a layer for the duration of the test.
func newDisk(t testing.TB) *disk {
	t.Helper()
	tls := libc.NewTLS()
	d := &disk{name: fmt.Sprintf("disk-%d", diskCount.Add(1))}
	d.real = (*sqlite3.Tsqlite3_vfs)(pointer(sqlite3.Xsqlite3_vfs_find(tls, 0)))
	require.NotNil(t, d.real)
	size := unsafe.Sizeof(*d.real)
	address := libc.Xmalloc(tls, types.Size_t(size))
	ours := (*sqlite3.Tsqlite3_vfs)(pointer(address))
	*ours = *d.real
	name, err := libc.CString(d.name)
	require.NoError(t, err)
	ours.FzName = name
	ours.FxOpen = function(diskOpen)
	ours.FxDelete = function(diskDelete)
	disks.Lock()
	if disks.byVFS == nil {
		disks.byVFS, disks.files, disks.methods = map[uintptr]*disk{}, map[uintptr]openFile{}, map[uintptr]uintptr{}
	}
	disks.byVFS[address] = d
	disks.Unlock()
	require.EqualValues(t, sqlite3.SQLITE_OK, sqlite3.Xsqlite3_vfs_register(tls, address, 0))
	t.Cleanup(func() {
		sqlite3.Xsqlite3_vfs_unregister(tls, address)
		disks.Lock()
		delete(disks.byVFS, address)
		disks.Unlock()
		libc.Xfree(tls, name)
		libc.Xfree(tls, address)
		tls.Close()
	})
	return d
}

// do records the operation and then does it, as one step of the trace.
func (d *disk) do(o operation, real func() int32) int32 {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.fail != nil {
		if code := d.fail(o); code != sqlite3.SQLITE_OK {
			if o.kind == opSync {
				o.kind = opSyncFailed
				d.trace = append(d.trace, o)
			}
			return code
		}
	}
	d.trace = append(d.trace, o)
	return real()
}

// note adds something of the test to the trace.
func (d *disk) note(v any) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.trace = append(d.trace, operation{kind: opNote, note: v})
}

// failWith sets the function that decides which operations fail.
func (d *disk) failWith(fail func(operation) int32) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.fail = fail
}

func (d *disk) operations() []operation {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Clone(d.trace)
}

// call makes a Go function of a C function pointer.
func call[F any](address uintptr) F {
	return *(*F)(unsafe.Pointer(&struct{ uintptr }{address}))
}

func diskOpen(tls *libc.TLS, vfs, name, file uintptr, flags int32, out uintptr) int32 {
	disks.Lock()
	d := disks.byVFS[vfs]
	disks.Unlock()
	code := call[func(*libc.TLS, uintptr, uintptr, uintptr, int32, uintptr) int32](d.real.FxOpen)(tls, vfs, name, file, flags, out)
	f := (*sqlite3.Tsqlite3_file)(pointer(file))
	if code != sqlite3.SQLITE_OK || f.FpMethods == 0 || name == 0 {
		return code
	}
	disks.Lock()
	defer disks.Unlock()
	real := (*sqlite3.Tsqlite3_io_methods)(pointer(f.FpMethods))
	ours, ok := disks.methods[f.FpMethods]
	if !ok {
		ours = libc.Xmalloc(tls, types.Size_t(unsafe.Sizeof(*real)))
		table := (*sqlite3.Tsqlite3_io_methods)(pointer(ours))
		*table = *real
		table.FxClose = function(diskClose)
		table.FxWrite = function(diskWrite)
		table.FxTruncate = function(diskTruncate)
		table.FxSync = function(diskSync)
		disks.methods[f.FpMethods] = ours
	}
	disks.files[file] = openFile{disk: d, name: filepath.Base(libc.GoString(name)), real: real}
	f.FpMethods = ours
	return code
}

func fileOf(file uintptr) openFile {
	disks.Lock()
	defer disks.Unlock()
	return disks.files[file]
}

func diskClose(tls *libc.TLS, file uintptr) int32 {
	f := fileOf(file)
	disks.Lock()
	delete(disks.files, file)
	disks.Unlock()
	return call[func(*libc.TLS, uintptr) int32](f.real.FxClose)(tls, file)
}

func diskWrite(tls *libc.TLS, file, data uintptr, n int32, at sqlite3.Tsqlite3_int64) int32 {
	f := fileOf(file)
	o := operation{kind: opWrite, file: f.name, at: at, data: bytes.Clone(unsafe.Slice((*byte)(pointer(data)), int(n)))}
	return f.disk.do(o, func() int32 {
		return call[func(*libc.TLS, uintptr, uintptr, int32, sqlite3.Tsqlite3_int64) int32](f.real.FxWrite)(tls, file, data, n, at)
	})
}

func diskTruncate(tls *libc.TLS, file uintptr, size sqlite3.Tsqlite3_int64) int32 {
	f := fileOf(file)
	return f.disk.do(operation{kind: opTruncate, file: f.name, at: size}, func() int32 {
		return call[func(*libc.TLS, uintptr, sqlite3.Tsqlite3_int64) int32](f.real.FxTruncate)(tls, file, size)
	})
}

func diskSync(tls *libc.TLS, file uintptr, flags int32) int32 {
	f := fileOf(file)
	// The files die with the test: there is no need to bother the real disk.
	return f.disk.do(operation{kind: opSync, file: f.name}, func() int32 { return sqlite3.SQLITE_OK })
}

func diskDelete(tls *libc.TLS, vfs, name uintptr, syncFolder int32) int32 {
	disks.Lock()
	d := disks.byVFS[vfs]
	disks.Unlock()
	return d.do(operation{kind: opDelete, file: filepath.Base(libc.GoString(name))}, func() int32 {
		return call[func(*libc.TLS, uintptr, uintptr, int32) int32](d.real.FxDelete)(tls, vfs, name, syncFolder)
	})
}

// crash is what may be left of unsynced writes when the power fails.
type crash uint8

const (
	losesAll   crash = iota // of what was not synced
	losesNone               // everything had reached the disk by luck
	losesSome               // any subset of the writes
	tearsSome               // any subset of 512-byte sectors
	crashKinds = iota
)

func (c crash) String() string {
	return [...]string{"loses all", "loses none", "loses some", "tears some"}[c]
}

// platter is the state of the disk at one moment of a trace.
type platter struct {
	durable map[string][]byte
	pending map[string][]operation
}

func newPlatter() *platter {
	return &platter{durable: map[string][]byte{}, pending: map[string][]operation{}}
}

func (p *platter) play(o operation) {
	switch o.kind {
	case opWrite, opTruncate:
		p.pending[o.file] = append(p.pending[o.file], o)
	case opSync:
		content := p.durable[o.file]
		for _, o := range p.pending[o.file] {
			content = change(content, o)
		}
		p.durable[o.file] = content
		delete(p.pending, o.file)
	case opSyncFailed:
		// Operating systems may forget what they could not write, and report
		// success the next time.
		delete(p.pending, o.file)
	case opDelete:
		delete(p.durable, o.file)
		delete(p.pending, o.file)
	}
}

// after returns what is on the disk when the power comes back.
func (p *platter) after(c crash, random *rand.Rand) map[string][]byte {
	files := map[string][]byte{}
	for name, content := range p.durable {
		files[name] = bytes.Clone(content)
	}
	names := make([]string, 0, len(p.pending))
	for name := range p.pending {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		content := files[name]
		for _, o := range p.pending[name] {
			switch c {
			case losesAll:
			case losesNone:
				content = change(content, o)
			case losesSome:
				if random.IntN(2) == 0 {
					content = change(content, o)
				}
			case tearsSome:
				for _, sector := range sectors(o) {
					if random.IntN(2) == 0 {
						content = change(content, sector)
					}
				}
			}
		}
		files[name] = content
	}
	return files
}

func sectors(o operation) []operation {
	if o.kind != opWrite {
		return []operation{o}
	}
	var all []operation
	for len(o.data) > 0 {
		n := min(len(o.data), 512-int(o.at%512))
		all = append(all, operation{kind: opWrite, file: o.file, at: o.at, data: o.data[:n]})
		o.data, o.at = o.data[n:], o.at+int64(n)
	}
	return all
}

func change(content []byte, o operation) []byte {
	size := o.at
	if o.kind == opWrite {
		size = max(int64(len(content)), o.at+int64(len(o.data)))
	}
	if int64(len(content)) < size {
		content = append(content, make([]byte, size-int64(len(content)))...)
	}
	content = content[:size]
	copy(content[min(o.at, size):], o.data)
	return content
}

// write makes the files in the folder.
func write(folder string, files map[string][]byte) error {
	for name, content := range files {
		if err := os.WriteFile(filepath.Join(folder, name), content, 0o600); err != nil {
			return err
		}
	}
	return nil
}
