package postgres

import (
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/internal/pgtest"
)

// Processes that start at the same time on an empty database all find a log,
// and it is the same one.
func TestOpen_TenAtOnce(t *testing.T) {
	t.Parallel()
	for range 3 {
		url := pgtest.Database(t)
		const processes = 10
		ids, failed := make([]string, processes), make([]error, processes)
		var group sync.WaitGroup
		start := make(chan struct{})
		for i := range processes {
			group.Go(func() {
				<-start
				s, err := Open(t.Context(), url)
				if failed[i] = err; err == nil {
					ids[i] = s.logID
					_ = s.Close()
				}
			})
		}
		close(start)
		group.Wait()
		for i := range processes {
			require.NoError(t, failed[i])
			require.Equal(t, ids[0], ids[i])
		}
	}
}
