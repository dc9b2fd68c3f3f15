// Package storetest certifies event stores: one named case per clause of the
// contract in package eventstore, run the same way against every backend, and
// benchmarks that compare them. It may import eventstore and its memory
// backend, which serves as the oracle of the random runs.
//
// A backend's test is a few lines:
//
//	func TestStore(t *testing.T) {
//		storetest.Run(t, func(t testing.TB) storetest.Opener {
//			path := filepath.Join(t.TempDir(), "log.db")
//			return func() (storetest.Store, error) { return sqlite.Open(path) }
//		}, storetest.Full())
//	}
//
// [Features] declares what the backend supports. A declared power is tested; a
// power that is not declared must be refused with an error that wraps
// errors.ErrUnsupported, so that declaration and behaviour cannot drift apart.
//
// Random runs print their seed when they fail; STORETEST_SEED=n replays one.
// Tests run shorter with -short.
package storetest
