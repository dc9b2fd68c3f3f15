// Package statetest certifies what implements [projection.State]: one named
// case per clause of its contract, run the same way against every backend. It
// may import projection and eventstore.
//
// A backend's test is a few lines:
//
//	func TestState(t *testing.T) {
//		statetest.Run(t, func(t testing.TB) statetest.Opener {
//			path := filepath.Join(t.TempDir(), "log.db")
//			return func() (statetest.State, error) { return sqlite.Open(path) }
//		}, statetest.Features{SQL: true, Reopen: true, LeasesEndWithProcess: true})
//	}
package statetest
